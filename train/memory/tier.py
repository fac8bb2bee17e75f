"""Files as a tier of memory (ZeRO-Infinity, Rajbhandari et al. 2021): segments are read before they
are needed and written after they are done, by threads, while the caller computes.

One file per kind of tensor. Reads and writes go past the page cache (O_DIRECT) where the file
system allows that; `direct` says whether. What is under way is bounded by what is asked for.
"""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.piece import as_bytes
from train.memory.segments import Segment

ALIGNED = 4096
SPANS = 1 << 16
"""How many of the last transfers are remembered."""
Key = tuple[str, int]


@dataclass(frozen=True)
class Span:
    """A read or a write, in seconds of time.monotonic()."""

    kind: str
    write: bool
    started_s: float
    ended_s: float


class Tier:
    """Segments of several kinds in files of a folder. dtypes: by kind; elements: of each file.

    delay_s: added to each transfer, as a slow disk would (for tests of overlap).
    """

    def __init__(
        self, folder: Path, elements: int, dtypes: Mapping[str, torch.dtype], delay_s: float = 0.0
    ) -> None:
        """Makes the files; what is in them is zero. They have no names, so that they go with the
        process. OSError as the file system has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.elements, self.dtypes = folder, elements, dict(dtypes)
        self.direct = _direct_works(folder)
        self.delay_s, self.ahead = delay_s, True
        self.read_bytes = self.written_bytes = 0
        self.spans: deque[Span] = deque(maxlen=SPANS)
        self._files: dict[str, int] = {}
        for kind, dtype in dtypes.items():
            self._files[kind] = _nameless(folder, kind, self.direct)
            os.posix_fallocate(self._files[kind], 0, elements * dtype.itemsize)
        self._readers = ThreadPoolExecutor(2, "read-ahead")
        self._writers = ThreadPoolExecutor(1, "write-behind")
        self._reading: dict[Key, Future[Tensor]] = {}
        self._writing: dict[Key, Future[None]] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def buffer(self, kind: str, segment: Segment) -> Tensor:
        """(padded,) memory for a segment, of undefined values; give it back with `release`."""
        dtype = self.dtypes[kind]
        wanted = segment.padded * dtype.itemsize
        with self._lock:
            kept = self._free.get(wanted)
            memory = kept.pop() if kept else None
        if memory is None:
            memory = torch.empty(wanted + ALIGNED, dtype=torch.uint8)
            memory = memory[-memory.data_ptr() % ALIGNED :][:wanted]
        return memory.view(dtype)

    def release(self, *buffers: Tensor) -> None:
        """Hands buffers back; nobody may use them any more."""
        with self._lock:
            for buffer in buffers:
                memory = buffer.view(torch.uint8)
                self._free.setdefault(memory.numel(), []).append(memory)

    def hint(self, kind: str, segment: Segment) -> None:
        """Begins to read a segment that will be taken soon."""
        key = (kind, segment.number)
        if self.ahead and key not in self._reading:
            self._reading[key] = self._readers.submit(self._read, kind, segment)

    def take(self, kind: str, segment: Segment) -> Tensor:
        """A segment's values, (padded,), in a buffer that is the caller's to release. OSError."""
        key = (kind, segment.number)
        if key not in self._reading:
            return self._read(kind, segment)
        return self._reading.pop(key).result()

    def put(self, kind: str, segment: Segment, buffer: Tensor) -> None:
        """Writes a segment behind the caller's back and releases the buffer. Waits for the write
        before it, so that at most two are under way."""
        assert (kind, segment.number) not in self._reading, "would be read as it was before"
        for earlier in list(self._writing.values())[:-1] if self.ahead else []:
            earlier.result()
        future = self._writers.submit(self._write, kind, segment, buffer)
        self._writing = {key: kept for key, kept in self._writing.items() if not kept.done()}
        self._writing[(kind, segment.number)] = future
        if not self.ahead:
            future.result()

    def settle(self) -> None:
        """Returns when all writes are in the files, and forgets what was read ahead. OSError."""
        for future in self._writing.values():
            future.result()
        self._writing.clear()
        for key in list(self._reading):
            self.release(self._reading.pop(key).result())

    def mapped(self, kind: str) -> Tensor:
        """(elements,) view of a file through the page cache; writes go to the file. Settled, and
        not while segments are read or written."""
        self.settle()
        name, count = f"/proc/self/fd/{self._files[kind]}", self.elements
        return torch.from_file(name, shared=True, size=count, dtype=self.dtypes[kind])

    def flush(self) -> None:
        """Has what was written through `mapped` on the disk, and out of the page cache."""
        for file in self._files.values():
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Ends the threads; the files stay."""
        self.settle()
        self._readers.shutdown()
        self._writers.shutdown()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _read(self, kind: str, segment: Segment) -> Tensor:
        written = self._writing.get((kind, segment.number))
        if written is not None:
            written.result()
        buffer = self.buffer(kind, segment)
        self._transfer(os.preadv, kind, segment, buffer, False)
        return buffer

    def _write(self, kind: str, segment: Segment, buffer: Tensor) -> None:
        self._transfer(os.pwritev, kind, segment, buffer, True)
        self.release(buffer)

    def _transfer(self, call, kind: str, segment: Segment, buffer: Tensor, write: bool) -> None:  # type: ignore[no-untyped-def]
        """All of a buffer; a call may move less than it was asked to."""
        started_s = time.monotonic()
        memory = as_bytes(buffer)
        start, done = segment.start * buffer.element_size(), 0
        while done < len(memory):
            moved = call(self._files[kind], [memory[done:]], start + done)
            if not moved:
                raise OSError(f"{self.folder}: {kind} ends at byte {start + done}")
            done += moved
        if self.delay_s:
            time.sleep(self.delay_s)
        with self._lock:
            self.spans.append(Span(kind, write, started_s, time.monotonic()))
            self.written_bytes += done if write else 0
            self.read_bytes += 0 if write else done


def _nameless(folder: Path, kind: str, direct: bool) -> int:
    made, path = tempfile.mkstemp(prefix=f"{kind}-", dir=folder)
    try:
        return os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
    finally:
        os.close(made)
        os.unlink(path)


def _direct_works(folder: Path) -> bool:
    """Whether the file system there takes O_DIRECT with blocks of ALIGNED bytes."""
    memory = torch.zeros(2 * ALIGNED, dtype=torch.uint8)
    block = memory[-memory.data_ptr() % ALIGNED :][:ALIGNED]
    try:
        file = _nameless(folder, "direct", True)
    except OSError:
        return False
    try:
        os.pwritev(file, [as_bytes(block)], 0)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
