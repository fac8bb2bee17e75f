"""Where checkpoints are kept: a flat space of named files that appear whole or not at all."""

from collections.abc import Iterable
from typing import Protocol


class StorageError(OSError):
    """Storage did not do what was asked; the message says what, where and why."""


class Missing(StorageError):
    """There is no file of that name."""


class Storage(Protocol):
    """Files under names like "folder/file". Errors are `StorageError`s; a failed or interrupted
    `put` leaves no file of that name, or the one that was there before."""

    def put(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        """Writes a file, block after block, and returns its bytes. When it returns, the file is
        durable: it survives the loss of power. Until then nobody sees any of it."""
        ...

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before. Missing if it is not there."""
        ...

    def names(self, prefix: str = "") -> list[str]:
        """Names of the files that begin so, sorted; empty when there are none."""
        ...

    def folders(self) -> list[str]:
        """Folders directly below, sorted, with those in which no file was ever finished."""
        ...

    def drop(self, folder: str, first: str) -> None:
        """Removes a folder with all that is in it; its file `first` is gone, durably, before
        anything else is. What is gone already is fine."""
        ...

    def where(self, name: str = "") -> str:
        """How a person finds this file."""
        ...


def open_storage(place: str) -> Storage:
    """A local folder, or `s3://bucket/prefix`. ValueError for another scheme."""
    from train.checkpoint.local import LocalStorage

    scheme, colon, rest = place.partition("://")
    if not colon:
        return LocalStorage(place)
    if scheme == "file":
        return LocalStorage(rest)
    if scheme == "s3":
        from train.checkpoint.s3 import open_s3

        return open_s3(rest)
    raise ValueError(f"checkpoints cannot be kept at {place!r}: a folder or s3://bucket/prefix can")
