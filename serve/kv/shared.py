"""A named file of shared memory with a header: created by one process, mapped by others.

Owns the file under /dev/shm from `create` to `unlink`. Promises that a reader maps only a
complete file of the right kind, that nobody takes over a live owner's name, and that what a
killed owner left is found by `sweep`. Called by `serve.kv.storage`; `sweep` by whoever watches
replicas. No torch.
"""

import mmap
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

SHARED_DIRECTORY = Path("/dev/shm")
HEADER_BYTES = 4096  # one memory page, so that what follows is aligned for any type
VERSION = 1
_MAGIC = b"SNDRLKV\0"
_LAYOUT = struct.Struct("<8sIqq16s5qq")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class Header(NamedTuple):
    """What a reader must know. `owner_start` tells a process from a later one of equal pid."""

    owner_pid: int
    owner_start: int  # clock ticks since boot, field 22 of /proc/<pid>/stat
    kv_format: str
    layers: int
    pages: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    file_bytes: int


def create(name: str, header: Header) -> mmap.mmap:
    """A new zero-filled file `name` of `header.file_bytes`, mapped for reading and writing.

    Memory is taken page by page as it is first touched, not here. A file of that name left by a
    dead owner is replaced. ValueError: bad name, name in use by a live process, or too little
    shared memory free.
    """
    path = _path(name)
    free = os.statvfs(SHARED_DIRECTORY)
    if header.file_bytes > free.f_bavail * free.f_frsize:
        raise ValueError(
            f"The KV cache needs {header.file_bytes:,} bytes of shared memory but "
            f"{SHARED_DIRECTORY} has {free.f_bavail * free.f_frsize:,} free: lower "
            f"engine.kv_tokens, or enlarge {SHARED_DIRECTORY}."
        )
    if path.exists():
        if owner_alive(read_header(name)):
            raise ValueError(f"The shared memory name {name!r} is in use by a live process.")
        path.unlink(missing_ok=True)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, header.file_bytes)
        memory = mmap.mmap(file, header.file_bytes)
    finally:
        os.close(file)
    # Last, in one store of a page: whoever opens the file earlier sees no magic and is refused.
    memory[: _LAYOUT.size] = _pack(header)
    return memory


def attach(name: str) -> tuple[Header, mmap.mmap]:
    """The header and a read-only mapping of an existing file; ValueError as in `read_header`."""
    header = read_header(name)
    with _path(name).open("rb") as file:
        return header, mmap.mmap(file.fileno(), header.file_bytes, access=mmap.ACCESS_READ)


def read_header(name: str) -> Header:
    """The header of file `name`; ValueError with a sentence when it isn't a usable KV store."""
    path = _path(name)
    if not path.is_file():
        raise ValueError(f"There is no shared KV store named {name!r}; its owner may be gone.")
    with path.open("rb") as file:
        raw = file.read(_LAYOUT.size)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < _LAYOUT.size or not raw.startswith(_MAGIC):
        raise ValueError(f"{name!r} is not a shared KV store, or is not complete yet.")
    _, version, pid, start, kv_format, *numbers = _LAYOUT.unpack(raw)
    if version != VERSION:
        raise ValueError(
            f"The shared KV store {name!r} has layout version {version}; this program reads "
            f"version {VERSION}: run the same release in every replica."
        )
    header = Header(pid, start, kv_format.rstrip(b"\0").decode("ascii", "replace"), *numbers)
    if header.file_bytes != size:
        raise ValueError(
            f"The shared KV store {name!r} has {size:,} bytes where its header says "
            f"{header.file_bytes:,}; it was cut or overwritten."
        )
    return header


def owner_alive(header: Header) -> bool:
    """Whether the very process that created the file still runs."""
    return process_start(header.owner_pid) == header.owner_start


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot; -1 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    fields = stat.rpartition(")")[2].split()  # the name before ")" may hold anything
    return -1 if fields[0] in "ZX" else int(fields[19])


def unlink(name: str) -> None:
    """Removes the name; mappings stay valid until dropped. No error when it is gone already."""
    _path(name).unlink(missing_ok=True)


def sweep(prefix: str) -> list[str]:
    """Removes KV stores whose name starts with `prefix` and whose owner died; their names.

    Files that are not KV stores, and those of live owners, are left alone.
    """
    removed = []
    for path in sorted(SHARED_DIRECTORY.glob(f"{prefix}*")):
        try:
            dead = not owner_alive(read_header(path.name))
        except ValueError:  # foreign or half-written: not ours to judge
            continue
        if dead:
            unlink(path.name)
            removed.append(path.name)
    return removed


def _pack(header: Header) -> bytes:
    pid, start, kv_format, *numbers = header
    return _LAYOUT.pack(_MAGIC, VERSION, pid, start, kv_format.encode(), *numbers)


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name shared memory: use letters, digits, '.', '_' and '-' only."
        )
    return SHARED_DIRECTORY / name
