"""Writes checkpoints: every rank its part and a receipt, then rank 0 the manifest.

Until the manifest is durable the folder is nothing, so a crash at any moment leaves the newest
whole checkpoint as it was. Only after that are older ones removed, manifest first.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from train.checkpoint.format import (
    CHUNK_BYTES,
    FORMAT,
    MANIFEST,
    Damaged,
    Manifest,
    Part,
    Receipt,
    StoredPiece,
    chunks,
    decode,
    encode,
    folder_name,
    gaps,
    header,
    parse_folder,
    part_name,
    sum_of,
)
from train.checkpoint.piece import Piece
from train.checkpoint.storage import Missing, Storage, StorageError

POLL_S = 0.02


class NotCommitted(RuntimeError):
    """A checkpoint did not become whole; the ones before it are as they were."""


class CheckpointWriter:
    """One rank's writer. attempt: the same on all ranks, never used before with this storage, so
    that what an earlier start left cannot be taken for a part of this one. keep: whole checkpoints
    that a commit leaves, the new one included."""

    def __init__(self, storage: Storage, attempt: str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least 1 checkpoint has to be kept")
        assert attempt and not set(attempt) & set("/. "), attempt
        self.storage, self.attempt, self.keep = storage, attempt, keep

    def write(
        self, step: int, meta: dict[str, Any], pieces: Sequence[Piece], rank: int, size: int
    ) -> None:
        """This rank's part and its receipt, durable when it returns. pieces: in host memory, not
        changed meanwhile; meta: JSON values, of which rank 0's count. StorageError as storage has
        it, after which the receipt (where it could be put) says why there is no part."""
        stem = f"{folder_name(step, self.attempt)}/{part_name(rank, size)}"
        file = f"{part_name(rank, size)}.safetensors"
        stored: list[StoredPiece] = []
        head = header(pieces)
        try:
            count = self.storage.put(f"{stem}.safetensors", _blocks(head, pieces, stored))
        except StorageError as error:
            self._put_receipt(stem, Receipt(part=None, failed=str(error)))
            raise
        part = Part(
            file=file, bytes=count, head_bytes=len(head), head_sum=sum_of(head), pieces=stored
        )
        self._put_receipt(stem, Receipt(part=part, meta=meta))

    def _put_receipt(self, stem: str, receipt: Receipt) -> None:
        try:
            self.storage.put(f"{stem}.json", [receipt.model_dump_json().encode()])
        except StorageError:
            if not receipt.failed:
                raise

    def commit(
        self,
        step: int,
        size: int,
        timeout_s: float = 600.0,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Manifest:
        """By rank 0: waits until all `size` ranks' receipts are there, makes the checkpoint whole
        and removes what is then too old. NotCommitted when a rank failed or gave no receipt in
        time, when elements are missing, or when `abandoned` says so; StorageError."""
        folder = folder_name(step, self.attempt)
        deadline_s = time.monotonic() + timeout_s
        receipts = []
        for rank in range(size):
            name = f"{folder}/{part_name(rank, size)}.json"
            receipts.append(self._receipt(name, rank, deadline_s, abandoned))
        parts = [receipt.part for receipt in receipts if receipt.part is not None]
        missing = gaps(parts)
        if missing:
            raise NotCommitted(f"step {step} is not whole: {'; '.join(missing[:3])}")
        manifest = Manifest(
            format=FORMAT,
            step=step,
            attempt=self.attempt,
            sequence=1 + max((m.sequence for m in self._whole()), default=0),
            chunk_bytes=CHUNK_BYTES,
            meta=receipts[0].meta,
            parts=parts,
        )
        self.storage.put(f"{folder}/{MANIFEST}", [encode(manifest)])
        self._retire(manifest)
        return manifest

    def _receipt(
        self, name: str, rank: int, deadline_s: float, abandoned: Callable[[], bool]
    ) -> Receipt:
        while True:
            try:
                receipt = Receipt.model_validate_json(self.storage.get(name))
            except Missing:
                if abandoned():
                    raise NotCommitted("the set of workers has changed") from None
                if time.monotonic() >= deadline_s:
                    raise NotCommitted(f"rank {rank} gave no receipt in time") from None
                time.sleep(POLL_S)
                continue
            if receipt.failed:
                raise NotCommitted(f"rank {rank}: {receipt.failed}")
            return receipt

    def _whole(self) -> list[Manifest]:
        found = []
        for name in self.storage.names():
            if parse_folder(name.partition("/")[0]) and name.endswith(f"/{MANIFEST}"):
                try:
                    found.append(decode(self.storage.get(name)))
                except (Damaged, Missing):
                    continue
        return found

    def _retire(self, new: Manifest) -> None:
        """Keeps `keep` checkpoints up to this step, one a step; removes what never was one."""
        kept: set[str] = set()
        steps: set[int] = set()
        for manifest in sorted(self._whole(), key=lambda m: (-m.step, -m.sequence)):
            older = manifest.step <= new.step
            if not older or (len(steps) < self.keep and manifest.step not in steps):
                kept.add(folder_name(manifest.step, manifest.attempt))
            if older:
                steps.add(manifest.step)
        for folder in set(self.storage.folders()) - kept:
            parsed = parse_folder(folder)
            if parsed and parsed[0] <= new.step:
                self.storage.drop(folder, MANIFEST)

    def rewind(self, step: int) -> None:
        """Removes every checkpoint after `step`, for a run that goes back there on purpose."""
        for folder in self.storage.folders():
            parsed = parse_folder(folder)
            if parsed and parsed[0] > step:
                self.storage.drop(folder, MANIFEST)


def _blocks(
    head: bytes, pieces: Sequence[Piece], stored: list[StoredPiece]
) -> Iterator[bytes | memoryview]:
    """A part's file, block by block; `stored` is filled on the way."""
    yield head
    offset = len(head)
    for piece in pieces:
        sums = []
        for chunk in chunks(piece):
            sums.append(sum_of(chunk))
            yield chunk
        stored.append(
            StoredPiece(
                name=piece.name,
                shape=list(piece.shape),
                dtype=piece.dtype,
                start=piece.start,
                stop=piece.stop,
                offset=offset,
                sums=sums,
            )
        )
        offset += piece.bytes
