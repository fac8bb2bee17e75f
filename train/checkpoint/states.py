"""A run's states as checkpoints: what `train.checkpoints.Checkpoints` asks for, on any storage."""

import os

import torch

from train.checkpoint.format import MANIFEST, parse_folder
from train.checkpoint.piece import share, stretch
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
        """Keeps a copy of the state; when it returns, on any rank, the state is durable, or rank 0
        has raised. StorageError, NotCommitted, WorldChanged."""
        writer = CheckpointWriter(self.storage, new_attempt(world), self.keep)
        meta = {"samples": state.samples, "meta": state.meta}
        pieces = share(state.tensors, world.rank, world.size)
        for name, tensor in state.ranks.get(world.rank, {}).items():
            whole = stretch(f"{RANK}{world.rank}/{name}", tensor, 0, tensor.numel())
            pieces.append(whole)
        failure: StorageError | None = None
        try:
            writer.write(state.step, meta, pieces, world.rank, world.size)
        except StorageError as error:  # its receipt tells rank 0 why
            failure = error
        world.barrier()  # a rank that died as it wrote ends this, and nobody waits for its receipt
        if failure is not None:
            raise failure
        if world.rank == 0:
            writer.commit(state.step, world.size)
        world.barrier()

    def newest(self) -> TrainState | None:
        """The newest whole one, or None; why others were passed over is logged."""
        checkpoint = CheckpointReader(self.storage).newest()
        return None if checkpoint is None else read_state(checkpoint)

    def clear(self) -> None:
        """Forgets all."""
        for folder in self.storage.folders():
            if parse_folder(folder):
                self.storage.drop(folder, MANIFEST)


def read_state(checkpoint: Checkpoint) -> TrainState:
    """A whole state, from whatever layout it was written in."""
    tensors, meta = {}, checkpoint.meta
    ranks: dict[int, dict[str, torch.Tensor]] = {}
    for name in checkpoint.names:
        first, _, rest = name.partition("/")
        if first.startswith(RANK):
            ranks.setdefault(int(first.removeprefix(RANK)), {})[rest] = checkpoint.tensor(name)
        else:
            tensors[name] = checkpoint.tensor(name)
    return TrainState(checkpoint.step, meta["samples"], tensors, meta["meta"], ranks)


def new_attempt(world: World) -> str:
    """A name that no earlier attempt had, the same on every rank: rank 0 draws it from the system,
    for a seed would give the same name again after a restart."""
    drawn = torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.uint8).clone()
    world.broadcast(drawn, 0)
    return bytes(drawn.tolist()).hex()
