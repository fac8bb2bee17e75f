"""A run's states as checkpoints: what `train.checkpoints.Checkpoints` asks for, on any storage."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from train.checkpoint.format import MANIFEST, parse_folder
from train.checkpoint.piece import Piece, share, stretch
from train.checkpoint.reader import Checkpoint, CheckpointReader
from train.checkpoint.storage import Storage, StorageError
from train.checkpoint.writer import CheckpointWriter
from train.state import TrainState
from train.world import World

RANK = "rank"
"""Prefix of what differs by rank: rank0/error/..., which each writes whole."""


class StoredCheckpoints:
    """States that all workers of a world hold alike; each writes its share. keep: how many."""

    def __init__(self, storage: Storage, keep: int = 2) -> None:
        self.storage, self.keep = storage, keep

    def save(self, state: TrainState, world: World) -> None:
        """Keeps a copy of a state that all ranks hold alike; see `write`."""
        meta = {"samples": state.samples, "meta": state.meta}
        self.write(state.step, meta, state_pieces(state, world), world)

    def write(self, step: int, meta: dict[str, Any], pieces: Sequence[Piece], world: World) -> None:
        """Keeps a copy of every rank's pieces; when it returns, on any rank, all of it is durable,
        or rank 0 has raised. meta: as `save` has it. StorageError, NotCommitted, WorldChanged."""
        writer = self.writer(world)
        failure: StorageError | None = None
        try:
            writer.write(step, meta, pieces, world.rank, world.size)
        except StorageError as error:  # its receipt tells rank 0 why
            failure = error
        world.barrier()  # a rank that died as it wrote ends this, and nobody waits for its receipt
        if failure is not None:
            raise failure
        if world.rank == 0:
            writer.commit(step, world.size)
        world.barrier()

    def writer(self, world: World) -> CheckpointWriter:
        """A writer for this world's ranks, which all ask for it together."""
        return CheckpointWriter(self.storage, new_attempt(world), self.keep)

    def find(self) -> Checkpoint | None:
        """The newest whole one, or None; why others were passed over is logged."""
        return CheckpointReader(self.storage).newest()

    def newest(self) -> TrainState | None:
        """The same, read."""
        checkpoint = self.find()
        return None if checkpoint is None else read_state(checkpoint)

    def clear(self) -> None:
        """Forgets all."""
        for folder in self.storage.folders():
            if parse_folder(folder):
                self.storage.drop(folder, MANIFEST)


def state_pieces(state: TrainState, world: World) -> list[Piece]:
    """This rank's equal share of what all hold alike, and all of what only it has."""
    pieces = share(state.tensors, world.rank, world.size)
    for name, tensor in state.ranks.get(world.rank, {}).items():
        pieces.append(stretch(f"{RANK}{world.rank}/{name}", tensor, 0, tensor.numel()))
    return pieces


def of_ranks(checkpoint: Checkpoint) -> dict[int, dict[str, torch.Tensor]]:
    """What differed by rank when it was written, by rank."""
    ranks: dict[int, dict[str, torch.Tensor]] = {}
    for name in checkpoint.names:
        first, _, rest = name.partition("/")
        if first.startswith(RANK):
            ranks.setdefault(int(first.removeprefix(RANK)), {})[rest] = checkpoint.tensor(name)
    return ranks


def read_state(checkpoint: Checkpoint) -> TrainState:
    """A whole state, from whatever layout it was written in."""
    alike = (name for name in checkpoint.names if not name.startswith(RANK))
    tensors, meta = {name: checkpoint.tensor(name) for name in alike}, checkpoint.meta
    ranks = of_ranks(checkpoint)
    return TrainState(checkpoint.step, meta["samples"], tensors, meta["meta"], ranks)


def new_attempt(world: World) -> str:
    """A name that no earlier attempt had, the same on every rank: rank 0 draws it from the system,
    for a seed would give the same name again after a restart."""
    drawn = torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.uint8).clone()
    world.broadcast(drawn, 0)
    return bytes(drawn.tolist()).hex()
