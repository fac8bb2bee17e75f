"""Checkpoints in a folder of a local or mounted file system.

A file is written beside its place under a name that begins with a dot, synced, renamed, and its
folder synced: what a crash leaves is either the whole file or none. All system calls go through a
`Disk`, so that tests can end a process, or fill the disk, at any one of them.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from train.checkpoint.storage import Missing, StorageError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
}


class Disk(Protocol):
    """The system calls that change a file system. Each raises OSError as the system does."""

    def create(self, path: Path) -> int:
        """A new, empty, open file; its descriptor."""
        ...

    def write(self, file: int, data: memoryview) -> int:
        """Bytes taken, at least one unless there were none to take."""
        ...

    def sync(self, file: int) -> None:
        """What was written survives the loss of power; not yet the file's name."""
        ...

    def sync_folder(self, path: Path) -> None:
        """The names in a folder survive it, too."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """At one moment `new` is what `old` was."""
        ...

    def make_folder(self, path: Path) -> None:
        """FileExistsError if it is there."""
        ...

    def remove(self, path: Path) -> None:
        """Removes a file."""
        ...

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        ...


class SystemDisk:
    """The operating system's calls; see `Disk`."""

    def create(self, path: Path) -> int:
        """See `Disk`."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, file: int, data: memoryview) -> int:
        """See `Disk`."""
        return os.write(file, data)

    def sync(self, file: int) -> None:
        """See `Disk`."""
        os.fsync(file)

    def sync_folder(self, path: Path) -> None:
        """See `Disk`."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk`."""
        os.rename(old, new)

    def make_folder(self, path: Path) -> None:
        """See `Disk`."""
        path.mkdir()

    def remove(self, path: Path) -> None:
        """See `Disk`."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """See `Disk`."""
        path.rmdir()


class LocalStorage:
    """A `Storage` in the folder `root`, which is made when the first file is put."""

    def __init__(self, root: Path | str, disk: Disk | None = None) -> None:
        self._root = Path(root).absolute()
        self._disk: Disk = disk or SystemDisk()

    def put(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        """See `Storage`."""
        path = self._root / name
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with _explained("written", path):
            self._make_folders(path.parent)
            try:
                count = self._write(unfinished, blocks)
                self._disk.rename(unfinished, path)
            except BaseException:
                with suppress(OSError):
                    self._disk.remove(unfinished)
                raise
            self._disk.sync_folder(path.parent)
        return count

    def _write(self, path: Path, blocks: Iterable[bytes | memoryview]) -> int:
        count = 0
        file = self._disk.create(path)
        try:
            for block in blocks:
                left = memoryview(block)
                count += len(left)
                while left:
                    left = left[self._disk.write(file, left) :]
            self._disk.sync(file)
        finally:
            os.close(file)
        return count

    def _make_folders(self, path: Path) -> None:
        if path.is_dir():
            return
        self._make_folders(path.parent)
        with suppress(FileExistsError):  # another rank was quicker
            self._disk.make_folder(path)
        self._disk.sync_folder(path.parent)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Storage`."""
        path = self._root / name
        with _explained("read", path), path.open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def names(self, prefix: str = "") -> list[str]:
        """See `Storage`. Files that are being written, or never were to the end, are not files."""
        with _explained("listed", self._root):
            names = [
                (Path(folder) / file).relative_to(self._root).as_posix()
                for folder, _, files in os.walk(self._root)
                for file in files
                if not file.startswith(".")
            ]
        return sorted(name for name in names if name.startswith(prefix))

    def folders(self) -> list[str]:
        """See `Storage`."""
        with _explained("listed", self._root):
            if not self._root.is_dir():
                return []
            return sorted(path.name for path in self._root.iterdir() if path.is_dir())

    def drop(self, folder: str, first: str) -> None:
        """See `Storage`. What unfinished writes left goes, too."""
        place = self._root / folder
        with _explained("removed", place):
            if (place / first).exists():
                self._disk.remove(place / first)
                self._disk.sync_folder(place)
            with suppress(FileNotFoundError):
                for path in sorted(place.iterdir()):
                    with suppress(FileNotFoundError):
                        self._disk.remove(path)
                self._disk.remove_folder(place)

    def where(self, name: str = "") -> str:
        """See `Storage`."""
        return str(self._root / name)


@contextmanager
def _explained(act: str, path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise Missing(error.errno, f"{path} is not there") from error
    except OSError as error:
        reason = REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(error.errno, f"{path} could not be {act}: {reason}") from error
