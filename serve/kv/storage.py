"""The K/V tensor of one replica and its generation numbers.

Owns the memory: private to the process, or a named file that other processes on the machine map
read-only to take pages without a copy through a third party. Promises memory committed only as
pages are first written, and no file left after `close`. The engine creates one per replica; the
transport attaches to a peer's.
"""

import ctypes
import mmap
import os
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.kv_formats import FORMATS
from serve.kv import shared


class KVShape(NamedTuple):
    """Sizes of a cache of layers * 2 * pages * page_tokens * kv_heads heads of head_dim values."""

    layers: int
    pages: int
    page_tokens: int
    kv_heads: int
    head_dim: int


class KVStorage:
    """`tensor[l, 0]` are layer l's keys (after RoPE), `tensor[l, 1]` its values.

    kv_format: a name in kernels.kv_formats. A head takes `elements` of its type: head_dim numbers,
    or as many bytes as quantised values take with their scales.
    Token-major: `tensor[l, 0].view(-1, kv_heads, elements)[slot]` is one token's keys, with
    slot = page * page_tokens + offset. Zero-filled at first, for free. `generation` is int64
    [pages], written by the PagePool above. With `name` the memory is a file of that name in
    /dev/shm; without, nobody else can see it.
    """

    def __init__(self, shape: KVShape, kv_format: str, name: str | None = None) -> None:
        """Errors: ValueError for a format or size that cannot be, or as in `shared.create`."""
        header = _header(shape, kv_format)
        memory = _private(header.file_bytes) if name is None else shared.create(name, header)
        self._open(header, memory, name)

    @classmethod
    def attach(cls, name: str) -> "KVStorage":
        """Another process's named storage, read-only.

        ValueError when there is none of that name or the file is not a KV store. Never write
        to `tensor`: the memory is mapped without write permission, so a write ends this process
        (`generation` raises instead). Compare `generation` of the pages before and after
        reading them: unchanged means that they were not given to somebody else meanwhile.
        """
        header, memory = shared.attach(name)
        if header.kv_format not in FORMATS or header != _header(
            KVShape(*header[3:8]), header.kv_format, header.owner_pid, header.owner_start
        ):
            raise ValueError(
                f"The header of the shared KV store {name!r} contradicts itself "
                f"({header.kv_format!r}, {header.file_bytes:,} bytes); it was overwritten."
            )
        storage = cls.__new__(cls)
        storage._open(header, memory, name)
        return storage

    def _open(self, header: shared.Header, memory: mmap.mmap, name: str | None) -> None:
        self.name = name
        self.shape = KVShape(*header[3:8])
        self.kv_format = header.kv_format
        self.owner_pid = header.owner_pid
        self.owned = header.owner_pid == os.getpid() and not memoryview(memory).readonly
        generation = shared.HEADER_BYTES
        tensor = _tensor_start(self.shape.pages)
        self.generation: NDArray[np.int64] = np.frombuffer(
            memory, np.int64, self.shape.pages, generation
        )
        self._tensor: torch.Tensor | None = torch.frombuffer(
            _as_writable(memory),
            dtype=stored_dtype(self.kv_format),
            offset=tensor,
        ).view(sizes(self.shape, self.kv_format))

    @property
    def tensor(self) -> torch.Tensor:
        """[layers, 2, pages, page_tokens, kv_heads, elements]; not after `close`."""
        assert self._tensor is not None, "the KV storage is closed"
        return self._tensor

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers; see the function."""
        return token_bytes(self.shape, self.kv_format)

    def copy_page(self, source: int, target: int) -> None:
        """Copies K and V of every layer of page `source` over page `target`."""
        assert self.owned, "an attached KV storage is read-only"
        self.tensor[:, :, target].copy_(self.tensor[:, :, source])

    def close(self) -> None:
        """Drops the tensor and, as the creating process, removes the file. Idempotent.

        The memory itself goes when the last tensor made from it goes, here and in readers.
        """
        if self._tensor is None:
            return
        self._tensor = None
        if self.name is not None and self.owned and self.owner_pid == os.getpid():
            shared.unlink(self.name)


def token_bytes(shape: KVShape, kv_format: str) -> int:
    """Bytes of K and V of one token: 2 * layers * kv_heads * those of a head.

    A head of D values takes 4 D in float32, 2 D in float16 and bfloat16, D + 4 in int8 and
    D / 2 + D / 8 in int4.
    """
    stored = FORMATS[kv_format]
    head_bytes = stored.elements(shape.head_dim) * stored.element_bytes
    return 2 * shape.layers * shape.kv_heads * head_bytes


def _private(size_bytes: int) -> mmap.mmap:
    """Zero-filled memory of this process alone, committed as it is touched."""
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(
            f"The KV cache needs {size_bytes:,} bytes of memory, which this machine does not "
            f"have: lower engine.kv_tokens."
        ) from error


def _header(
    shape: KVShape, kv_format: str, pid: int | None = None, start: int | None = None
) -> shared.Header:
    if kv_format not in FORMATS:
        raise ValueError(
            f"A KV cache in {kv_format} is not supported; use one of {', '.join(FORMATS)}."
        )
    if min(shape) < 1:
        raise ValueError(f"Every size of a KV cache must be at least 1; got {shape}.")
    pid = os.getpid() if pid is None else pid
    start = shared.process_start(pid) if start is None else start
    body = shape.pages * shape.page_tokens * token_bytes(shape, kv_format)
    return shared.Header(pid, start, kv_format, *shape, _tensor_start(shape.pages) + body)


def _tensor_start(pages: int) -> int:
    """Byte offset of the tensor: header, then generations, then up to the next 4096."""
    end = shared.HEADER_BYTES + pages * 8
    return -(-end // shared.HEADER_BYTES) * shared.HEADER_BYTES


def stored_dtype(kv_format: str) -> torch.dtype:
    """Of the elements of a KV store."""
    dtype: torch.dtype = getattr(torch, FORMATS[kv_format].stored)
    return dtype


def sizes(shape: KVShape, kv_format: str) -> tuple[int, ...]:
    """[layers, 2, pages, page_tokens, kv_heads, elements] of a KV store."""
    elements = FORMATS[kv_format].elements(shape.head_dim)
    return (shape.layers, 2, shape.pages, shape.page_tokens, shape.kv_heads, elements)


def _as_writable(memory: mmap.mmap) -> ctypes.Array[ctypes.c_char]:
    """The same bytes as a buffer that torch takes without warning that it is read-only.

    The array's `memory` attribute keeps the mapping alive for as long as any tensor over it.
    """
    view = np.frombuffer(memory, np.uint8)
    buffer = (ctypes.c_char * len(memory)).from_address(view.ctypes.data)
    buffer.memory = view  # type: ignore[attr-defined]
    return buffer
