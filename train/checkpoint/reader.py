"""Reads checkpoints: the newest whole one, and any stretch of any of its tensors.

Every byte that is handed out has been compared with its sum. What was passed over, and why, is
kept and logged.
"""

import logging
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.format import (
    MANIFEST,
    WIDTHS,
    Damaged,
    Manifest,
    Part,
    StoredPiece,
    decode,
    folder_name,
    parse_folder,
    stored_bytes,
    sum_of,
)
from train.checkpoint.piece import torch_dtype
from train.checkpoint.storage import Missing, Storage

log = logging.getLogger(__name__)

READ_BYTES = 64 << 20
"""At most so much is read at once where whole parts are compared with their sums."""


@dataclass(frozen=True)
class PassedOver:
    """A folder that is no checkpoint, and why."""

    folder: str
    reason: str


class Checkpoint:
    """A whole checkpoint. step, meta: as written. `read` raises Damaged where bytes have changed
    since, Missing where a file has gone, StorageError as storage has it."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._chunk_bytes = storage, manifest.chunk_bytes
        self.manifest, self.step = manifest, manifest.step
        self.meta: dict[str, Any] = manifest.meta
        self.folder = folder_name(manifest.step, manifest.attempt)
        self._pieces: dict[str, list[tuple[str, StoredPiece]]] = {}
        for part in manifest.parts:
            for piece in part.pieces:
                self._pieces.setdefault(piece.name, []).append((part.file, piece))

    @property
    def names(self) -> list[str]:
        """Its tensors, in no particular order."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. KeyError if there is none of that name."""
        return tuple(self._pieces[name][0][1].shape)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in its shape."""
        return self.read(name).view(self.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, from whichever parts hold them. A new
        tensor in host memory. KeyError if there is none of that name."""
        pieces = self._pieces[name]
        count = prod(pieces[0][1].shape)
        stop = count if stop is None else stop
        assert 0 <= start <= stop <= count, (name, start, stop)
        out = torch.empty(stop - start, dtype=torch_dtype(pieces[0][1].dtype))
        at = start
        for file, piece in sorted(pieces, key=lambda found: (found[1].start, -found[1].stop)):
            first, last = max(at, piece.start), min(stop, piece.stop)
            if first < last:
                assert first == at, f"{name} has a gap at {at}"  # a manifest has none
                out[first - start : last - start] = self._stretch(file, piece, first, last)
                at = last
        assert at == stop, f"{name} ends at {at}"
        return out

    def _stretch(self, file: str, piece: StoredPiece, first: int, last: int) -> Tensor:
        """Elements [first, last), counted in the tensor, of one piece: whole chunks are read."""
        width, size = WIDTHS[piece.dtype], self._chunk_bytes
        begin, end = (first - piece.start) * width, (last - piece.start) * width
        aligned = begin // size * size
        wanted = min(stored_bytes(piece), -(-end // size) * size)
        where = f"{self.folder}/{file}"
        data = self._storage.get(where, piece.offset + aligned, piece.offset + wanted)
        if len(data) != wanted - aligned:
            raise Damaged(f"{file} ends early, within {piece.name}")
        view = memoryview(data)
        for at in range(aligned, wanted, size):
            chunk = view[at - aligned : at - aligned + size]
            if sum_of(chunk) != piece.sums[at // size]:
                raise Damaged(f"{file} has changed within {piece.name} (CRC-32)")
        raw = bytearray(view[begin - aligned : end - aligned])
        return torch.frombuffer(raw, dtype=torch_dtype(piece.dtype))

    def verify(self) -> None:
        """Reads all of it. Damaged or Missing if something is not as it was written."""
        for part in self.manifest.parts:
            if len(self._storage.get(f"{self.folder}/{part.file}", part.bytes - 1)) != 1:
                raise Damaged(f"{part.file} has not its {part.bytes} bytes")
            head = self._storage.get(f"{self.folder}/{part.file}", 0, part.head_bytes)
            if sum_of(head) != part.head_sum:
                raise Damaged(f"{part.file} has changed within its head (CRC-32)")
            self._verify_data(part)

    def _verify_data(self, part: Part) -> None:
        """Many chunks with one request, for pieces may be small and storage far."""
        chunks = [
            (piece.name, piece.offset + at * self._chunk_bytes, sum_)
            for piece in part.pieces
            for at, sum_ in enumerate(piece.sums)
        ]
        ends = [offset for _, offset, _ in chunks[1:]] + [part.bytes]
        done = 0
        while done < len(chunks):
            begin, last = chunks[done][1], done
            while last + 1 < len(chunks) and ends[last + 1] - begin <= READ_BYTES:
                last += 1
            data = memoryview(self._storage.get(f"{self.folder}/{part.file}", begin, ends[last]))
            for (name, offset, sum_), end in zip(
                chunks[done : last + 1], ends[done : last + 1], strict=True
            ):
                if sum_of(data[offset - begin : end - begin]) != sum_:
                    raise Damaged(f"{part.file} has changed within {name} (CRC-32)")
            done = last + 1


def read_checked(found: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """A whole tensor of a checkpoint. ValueError unless it is there in this shape."""
    there = found.shape(name) if name in found.names else None
    if there != shape:
        said = "nothing" if there is None else f"shape {there}"
        raise ValueError(f"state: {name} needs {shape}, found {said}.")
    return found.tensor(name)


class CheckpointReader:
    """passed_over: what the last `newest` did not take, newest first."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.passed_over: list[PassedOver] = []

    def newest(self, verify: bool = True) -> Checkpoint | None:
        """The newest whole checkpoint (of equal steps the one committed last), or None. verify:
        every byte is read and compared first; without it, only what `read` then reads."""
        self.passed_over = []
        for checkpoint in self._candidates():
            try:
                if verify:
                    checkpoint.verify()
                return checkpoint
            except (Damaged, Missing) as error:
                self._pass_over(checkpoint.folder, str(error))
        return None

    def _candidates(self) -> list[Checkpoint]:
        found = []
        names = self._storage.names()
        folders = {name.partition("/")[0] for name in names}
        for folder in sorted(folder for folder in folders if parse_folder(folder)):
            if f"{folder}/{MANIFEST}" not in names:
                self._pass_over(folder, "it has no manifest: its writing never ended")
                continue
            try:
                manifest = decode(self._storage.get(f"{folder}/{MANIFEST}"))
                found.append(Checkpoint(self._storage, manifest))
            except (Damaged, Missing) as error:
                self._pass_over(folder, str(error))
        return sorted(found, key=lambda c: (-c.step, -c.manifest.sequence))

    def _pass_over(self, folder: str, reason: str) -> None:
        self.passed_over.append(PassedOver(folder, reason))
        log.warning("checkpoint %s is passed over: %s", self._storage.where(folder), reason)
