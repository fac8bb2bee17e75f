"""Whole states of a world of which a member dies, or cannot write."""

from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.disks import FullDisk
from train.checkpoint.local import LocalStorage
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.states import StoredCheckpoints
from train.checkpoint.storage import StorageError
from train.state import TrainState
from train.world import LocalWorld, WorldChanged


class OfTwo(LocalWorld):
    """Rank 0 of a world whose other member is gone, or never wrote: `barriers` of them are met."""

    size = 2

    def __init__(self, barriers: int) -> None:
        super().__init__()
        self.left = barriers

    def barrier(self) -> None:
        if not self.left:
            raise WorldChanged(frozenset({1}))
        self.left -= 1


def state() -> TrainState:
    return TrainState(3, 12, {"param/w": torch.arange(8.0)}, {})


def test_nobody_waits_for_the_receipt_of_a_rank_that_died_as_it_wrote(tmp_path: Path):
    """Without the barrier before it, the commit would wait for ten minutes."""
    with pytest.raises(WorldChanged):
        StoredCheckpoints(LocalStorage(tmp_path)).save(state(), OfTwo(barriers=0))
    assert CheckpointReader(LocalStorage(tmp_path)).newest() is None


def test_a_rank_that_cannot_write_meets_the_others_and_then_says_why(tmp_path: Path):
    world = OfTwo(barriers=1)
    with pytest.raises(StorageError, match="the disk is full"):
        StoredCheckpoints(LocalStorage(tmp_path, FullDisk(0))).save(state(), world)
    assert world.left == 0
