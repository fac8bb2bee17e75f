"""Disks that fail on purpose: one kills its process, one fills up, one loses its caches."""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint.local import SystemDisk

CALLS = (
    "create",
    "write",
    "sync",
    "sync_folder",
    "rename",
    "make_folder",
    "remove",
    "remove_folder",
)


class WatchedDisk(SystemDisk):
    """Calls `before(number, name)` ahead of each system call and `after` behind it, from 0 on."""

    def __init__(self, before: Callable[[int, str], None], after: Callable[[int, str], None]):
        self.calls: list[str] = []
        self._before, self._after = before, after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CALLS:
            return found

        def call(*arguments: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            self._before(number, name)
            answer = found(*arguments)
            self._after(number, name)
            return answer

        return call


def counting() -> WatchedDisk:
    return WatchedDisk(lambda *_: None, lambda *_: None)


class KillingDisk(WatchedDisk):
    """SIGKILLs its own process at call `at`: before it, after it, or (a write) half way."""

    def __init__(self, at: int, moment: str):
        self._at, self._moment = at, moment

        def kill(when: str) -> Callable[[int, str], None]:
            def act(number: int, name: str) -> None:
                if number == at and moment == when:
                    os.kill(os.getpid(), signal.SIGKILL)

            return act

        super().__init__(kill("before"), kill("after"))

    def write(self, file: int, data: memoryview) -> int:
        if self._moment == "half" and len(self.calls) - 1 == self._at:
            os.write(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(file, data)


class FullDisk(SystemDisk):
    """Takes `left_bytes`, then says so."""

    def __init__(self, left_bytes: int):
        self.left_bytes = left_bytes

    def write(self, file: int, data: memoryview) -> int:
        if self.left_bytes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(file, data[: self.left_bytes])
        self.left_bytes -= taken
        return taken


class PowerLost(BaseException):
    """The machine is off."""


class VolatileDisk(SystemDisk):
    """A disk whose caches are lost with the power, as badly as POSIX allows.

    Data of a file are there only up to its last sync; a name only since its folder's last sync.
    `lose_power(kept, seed)` builds in `kept` what a machine could find afterwards: unsynced data
    cut at random, each unsynced change of names done or not done at random.
    off: sync and sync_folder do nothing at all (the mutation).
    """

    def __init__(self, root: Path, dies_at: int = 1 << 60, off: tuple[str, ...] = ()):
        self.root, self.dies_at, self.off = root, dies_at, off
        self.calls = 0
        self.synced: dict[int, bytes] = {}  # by inode
        self.durable: dict[Path, int | None] = {}  # names that are safe: inode, None for a folder
        self.pending: list[tuple[Path, Path, int | None | str]] = []  # folder, name, what
        self.data: dict[int, bytes] = {}
        self._open: dict[int, int] = {}

    def _tick(self) -> None:
        self.calls += 1
        if self.calls > self.dies_at:
            raise PowerLost

    def create(self, path: Path) -> int:
        self._tick()
        file = super().create(path)
        inode = os.fstat(file).st_ino
        # An inode number may be used again: what was known of it is not of this file.
        key = self._open[file] = inode << 32 | self.calls
        self.synced[key], self.data[key] = b"", b""
        self.pending.append((path.parent, path, key))
        return file

    def write(self, file: int, data: memoryview) -> int:
        self._tick()
        self.data[self._open[file]] += bytes(data)
        return super().write(file, data)

    def sync(self, file: int) -> None:
        self._tick()
        if "sync" not in self.off:
            key = self._open[file]
            self.synced[key] = self.data[key]

    def sync_folder(self, path: Path) -> None:
        self._tick()
        if "sync_folder" in self.off:
            return
        for folder, name, what in [change for change in self.pending if change[0] == path]:
            self._apply(self.durable, name, what)
            self.pending.remove((folder, name, what))

    def rename(self, old: Path, new: Path) -> None:
        self._tick()
        super().rename(old, new)
        key = self._key(old)
        self.pending.append((new.parent, new, key))
        self.pending.append((old.parent, old, "removed"))

    def make_folder(self, path: Path) -> None:
        self._tick()
        super().make_folder(path)
        self.pending.append((path.parent, path, None))

    def remove(self, path: Path) -> None:
        self._tick()
        super().remove(path)
        self.pending.append((path.parent, path, "removed"))

    def remove_folder(self, path: Path) -> None:
        self._tick()
        super().remove_folder(path)
        self.pending.append((path.parent, path, "removed"))

    def _key(self, path: Path) -> int | None:
        names = dict(self.durable)
        for _, name, what in self.pending:
            self._apply(names, name, what)
        return names[path]

    @staticmethod
    def _apply(names: dict[Path, int | None], name: Path, what: int | None | str) -> None:
        if what == "removed":
            names.pop(name, None)
        else:
            assert not isinstance(what, str)
            names[name] = what

    def lose_power(self, kept: Path, seed: int) -> None:
        chance = random.Random(seed)
        names = dict(self.durable)
        for _, name, what in self.pending:
            if chance.random() < 0.5:
                self._apply(names, name, what)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name, key in sorted(names.items()):
            place = kept / name.relative_to(self.root)
            if not all(
                (parent in names) or parent == self.root for parent in _above(name, self.root)
            ):
                continue
            if key is None:
                place.mkdir(exist_ok=True)
                continue
            safe, written = self.synced[key], self.data[key]
            extra = chance.randint(0, len(written) - len(safe)) if written != safe else 0
            place.write_bytes(written[: len(safe) + extra])


def _above(path: Path, root: Path) -> list[Path]:
    found = []
    while path.parent != root:
        path = path.parent
        found.append(path)
    return found
