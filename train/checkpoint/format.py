"""How a checkpoint looks in storage, and what makes it whole.

    step-00000042.9f3c51d2a7e04b18/          the step, and the attempt that wrote it
        part-00000-of-00004.safetensors      one rank's pieces; any safetensors reader opens it
        part-00000-of-00004.json             its receipt: every piece, with a CRC-32 of each chunk
        manifest.json                        written last: all receipts, the meta, and a SHA-256

A folder with a sound manifest whose parts have their sizes and sums is whole; every other one is
not a checkpoint. An attempt never writes into another's folder, so nothing whole is ever touched.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from pydantic import BaseModel, ConfigDict

from train.checkpoint.piece import CODES, Piece, as_bytes

FORMAT = "sanderling-checkpoint-1"
CHUNK_BYTES = 4 << 20
"""So much is read at least to get at one element, since sums are over whole chunks."""
MANIFEST = "manifest.json"


class Damaged(ValueError):
    """What is in storage is not what was written; the message says where."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredPiece(_Record):
    """A piece at byte `offset` of its part's file; sums: CRC-32 of each chunk of its bytes."""

    name: str
    shape: list[int]
    dtype: str
    start: int
    stop: int
    offset: int
    sums: list[int]


class Part(_Record):
    """One rank's file (its name within the folder), and what is in it. head_bytes, head_sum: of
    what is before the data, with its CRC-32."""

    file: str
    bytes: int
    head_bytes: int
    head_sum: int
    pieces: list[StoredPiece]


class Receipt(_Record):
    """One rank's word that its part is durable, or why it is not (failed)."""

    part: Part | None
    meta: dict[str, Any] = {}
    failed: str = ""


class Manifest(_Record):
    """All of a checkpoint. sequence: later commits of the same step have higher ones."""

    format: str
    step: int
    attempt: str
    sequence: int
    chunk_bytes: int
    meta: dict[str, Any]
    parts: list[Part]


def folder_name(step: int, attempt: str) -> str:
    """The folder of one attempt at one step."""
    return f"step-{step:08d}.{attempt}"


def parse_folder(name: str) -> tuple[int, str] | None:
    """The step and the attempt of a folder's name; None for what is no checkpoint's."""
    head, dot, attempt = name.partition(".")
    digits = head.removeprefix("step-")
    if not (head.startswith("step-") and digits.isdecimal() and dot and attempt):
        return None
    return int(digits), attempt


def part_name(rank: int, size: int) -> str:
    """A part's file name without its suffix."""
    return f"part-{rank:05d}-of-{size:05d}"


def header(pieces: Sequence[Piece]) -> bytes:
    """The head of a safetensors file whose data are the pieces' bytes in this order: eight bytes of
    length, then JSON, padded with spaces so that the data are aligned to eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    offset = 0
    for piece in pieces:
        table[f"{piece.name}[{piece.start}:{piece.stop}]"] = {
            "dtype": CODES[piece.dtype],
            "shape": [piece.stop - piece.start],
            "data_offsets": [offset, offset + piece.bytes],
        }
        offset += piece.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def chunks(piece: Piece, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """A piece's bytes, as they are summed."""
    data = as_bytes(piece.data)
    for start in range(0, len(data), chunk_bytes):
        yield data[start : start + chunk_bytes]


def sum_of(chunk: bytes | memoryview) -> int:
    """A chunk's CRC-32."""
    return zlib.crc32(chunk)


def encode(manifest: Manifest) -> bytes:
    """The manifest with the sum of its own text."""
    body = manifest.model_dump_json()
    return f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}","body":{body}}}'.encode()


def decode(text: bytes) -> Manifest:
    """The manifest; Damaged if one bit of it is not as it was written."""
    head = len(b'{"sha256":"') + 64
    body = text[head + len(b'","body":') : -1]
    if text != b'{"sha256":"%b","body":%b}' % (hashlib.sha256(body).hexdigest().encode(), body):
        raise Damaged("its manifest is not as it was written (SHA-256)")
    manifest = Manifest.model_validate_json(body)
    if manifest.format != FORMAT:
        raise Damaged(f"its format is {manifest.format!r}; this release reads {FORMAT!r}")
    return manifest


def stored_bytes(piece: StoredPiece) -> int:
    """Bytes that a piece takes in its file."""
    return (piece.stop - piece.start) * WIDTHS[piece.dtype]


WIDTHS = {
    name: 1 if code == "BOOL" else int(code.lstrip("BFIU")) // 8 for name, code in CODES.items()
}
"""Bytes of an element."""


def gaps(parts: Sequence[Part]) -> list[str]:
    """What the parts do not tell of their tensors, or tell in two ways; empty when all is there."""
    found = []
    by_name: dict[str, list[StoredPiece]] = {}
    for piece in (piece for part in parts for piece in part.pieces):
        by_name.setdefault(piece.name, []).append(piece)
    for name, pieces in by_name.items():
        if len({(tuple(piece.shape), piece.dtype) for piece in pieces}) > 1:
            found.append(f"{name} has several shapes or dtypes")
            continue
        count = prod(pieces[0].shape)
        stretches = sorted((piece.start, piece.stop) for piece in pieces)
        reached = 0
        for start, stop in [*stretches, (count, count)]:
            if start > reached:
                found.append(f"{name} lacks elements {reached} to {start - 1}")
            reached = max(reached, stop)
    return found
