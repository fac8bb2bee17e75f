"""Reads the container of a GGUF file: metadata and a table of tensors, no meaning.

Safe on hostile input: every length is checked against the bytes that are left before anything is
allocated, and every refusal is a ValueError with one sentence that names the file. Imports no
torch. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.formats import FORMATS, BlockFormat

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4

# ggml's numbers of the block formats that we decode.
TENSOR_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: shape with the row length last, format, first byte, byte count."""

    shape: tuple[int, ...]
    format: BlockFormat
    start: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open, mapped file. metadata holds plain Python values; tensors are found by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    data: mmap.mmap

    def stored_bytes(self, name: str) -> memoryview:
        """The blocks of one tensor, mapped privately (writing to them never reaches the file)."""
        tensor = self.tensors[name]
        return memoryview(self.data)[tensor.start : tensor.start + tensor.size_bytes]


class _Cursor:
    """A position in the mapped bytes that cannot be moved past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is not a GGUF file that can be loaded: {reason}.")

    def need(self, count: int, what: str) -> None:
        left = len(self.data) - self.position
        if count > left:
            raise self.refuse(f"it is truncated, {what} wants {count} bytes where {left} are left")

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self.need(size, what)
        (value,) = struct.unpack_from(code, self.data, self.position)
        self.position += size
        return value

    def text(self, what: str) -> str:
        length = self.scalar("<Q", what)
        self.need(length, what)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth >= MAX_ARRAY_DEPTH:
            raise self.refuse(f"{what} has value type {kind}, accepted are 0 to 12")
        return self._array(what, depth)

    def _array(self, what: str, depth: int) -> list[Any]:
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self.need(size * count, what)
            letter = _SCALARS[kind][1]
            values = struct.unpack_from(f"<{count}{letter}", self.data, self.position)
            self.position += size * count
            return list(values)
        # The smallest string is its length, the smallest array a type and a count.
        self.need((8 if kind == _STRING else 12) * count, what)
        if kind == _STRING:
            return [self.text(what) for _ in range(count)]
        return [self.value(kind, what, depth + 1) for _ in range(count)]


def open_gguf(path: Path) -> GGUFFile:
    """Maps and checks a GGUF file of version 2 or 3. ValueError when it is missing, truncated,
    foreign, or holds a tensor in a format that we do not decode."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; a GGUF file is wanted.")
    with path.open("rb") as file:
        if path.stat().st_size < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {MAGIC!r}.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = _Cursor(path, data)
    cursor.position = len(MAGIC)
    version = cursor.scalar("<I", "the version")
    if version not in VERSIONS:
        raise cursor.refuse(f"its version is {version}, accepted are 2 and 3 (little-endian)")
    tensor_count = cursor.scalar("<Q", "the tensor count")
    metadata = _read_metadata(cursor, cursor.scalar("<Q", "the metadata count"))
    return GGUFFile(path, metadata, _read_tensors(cursor, tensor_count, metadata), data)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise cursor.refuse(f"metadata key {key!r} occurs twice")
        what = f"metadata {key!r}"
        metadata[key] = cursor.value(cursor.scalar("<I", what), what)
    return metadata


def _read_tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.refuse(f"general.alignment is {alignment!r}, accepted are powers of two")
    entries: dict[str, StoredTensor] = {}
    for _ in range(count):
        name = cursor.text("a tensor name")
        if name in entries:
            raise cursor.refuse(f"tensor {name!r} occurs twice")
        entries[name] = _read_tensor(cursor, name)
    base = -(-cursor.position // alignment) * alignment
    placed = {}
    for name, entry in entries.items():
        start = base + entry.start
        if entry.start % alignment:
            raise cursor.refuse(f"tensor {name!r} is not aligned to {alignment} bytes")
        if start + entry.size_bytes > len(cursor.data):
            raise cursor.refuse(f"it is truncated, tensor {name!r} ends past the end of the file")
        placed[name] = StoredTensor(entry.shape, entry.format, start, entry.size_bytes)
    return placed


def _read_tensor(cursor: _Cursor, name: str) -> StoredTensor:
    """One row of the tensor table; its start is still relative to the data section."""
    what = f"tensor {name!r}"
    dimensions = cursor.scalar("<I", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.refuse(f"{what} has {dimensions} dimensions, accepted are 1 to 4")
    shape = tuple(reversed([cursor.scalar("<Q", what) for _ in range(dimensions)]))
    number, offset = cursor.scalar("<I", what), cursor.scalar("<Q", what)
    if number not in TENSOR_TYPES:
        known = ", ".join(TENSOR_TYPES.values())
        raise cursor.refuse(f"{what} has block format number {number}, accepted are {known}")
    form = FORMATS[TENSOR_TYPES[number]]
    values = 1
    for length in shape:
        values *= length
    if values == 0 or shape[-1] % form.block_values:
        raise cursor.refuse(
            f"{what} has shape {shape}, rows must be multiples of "
            f"{form.block_values} for {form.name} and not empty"
        )
    size_bytes = values // form.block_values * form.block_bytes
    return StoredTensor(shape, form, offset, size_bytes)
