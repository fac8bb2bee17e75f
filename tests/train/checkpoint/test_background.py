"""Two phases: what is written is the state at the step's end, whatever training does meanwhile."""

import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.checkpoint.samples import is_state, state
from train.checkpoint.background import BackgroundCheckpoints, CheckpointsFail
from train.checkpoint.local import LocalStorage
from train.checkpoint.piece import Piece, share
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.states import StoredCheckpoints
from train.checkpoint.storage import StorageError
from train.checkpoint.writer import CheckpointWriter
from train.resilience.checkfreq import CheckFreq
from train.state import TrainState
from train.world import LocalWorld


class SlowStorage(LocalStorage):
    """Writes only once it is let; or never can."""

    def __init__(self, root: Path, fails: bool = False):
        super().__init__(root)
        self.let, self.fails = threading.Event(), fails

    def put(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        assert self.let.wait(60)
        if self.fails:
            raise StorageError("the disk is gone")
        return super().put(name, blocks)


def make(storage: LocalStorage, every: int = 1, **options: Any) -> BackgroundCheckpoints:
    writer = CheckpointWriter(storage, "a", keep=100)
    return BackgroundCheckpoints(writer, 0, 1, CheckFreq(), every_steps=every, **options)


def pair(pieces: list[Piece]) -> tuple[dict[str, Any], list[Piece]]:
    return {}, pieces


def newest(root: Path):
    found = CheckpointReader(LocalStorage(root)).newest()
    assert found is not None
    return found.step, {name: found.tensor(name) for name in found.names}


def test_training_goes_on_while_it_is_written(tmp_path: Path):
    """The live tensors change after `before_update`, before a byte is written."""
    storage = SlowStorage(tmp_path)
    background = make(storage)
    live = state(1)
    assert background.step_done(1, lambda: ({}, share(live, 0, 1)))
    background.before_update()
    for tensor in live.values():
        tensor.zero_()
    assert storage.names() == []
    storage.let.set()
    background.finish()
    step, tensors = newest(tmp_path)
    assert step == 1 and is_state(tensors, 1)
    background.close()


def test_without_the_wait_it_would_be_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mutation: nothing copied, the live tensors written."""
    monkeypatch.setattr(BackgroundCheckpoints, "_copy", lambda self, piece: piece)
    storage = SlowStorage(tmp_path)
    background = make(storage)
    live = state(1)
    background.step_done(1, lambda: ({}, share(live, 0, 1)))
    background.before_update()
    for tensor in live.values():
        tensor.zero_()
    storage.let.set()
    background.finish()
    assert not is_state(newest(tmp_path)[1], 1)
    background.close()


def test_one_at_a_time(tmp_path: Path):
    storage = SlowStorage(tmp_path)
    storage.let.set()
    background = make(storage)
    for step in range(1, 8):
        pieces = share(state(step), 0, 1)
        background.step_done(step, partial(pair, pieces))
        background.before_update()
    background.finish()
    assert [outcome.step for outcome in background.outcomes] == list(range(1, 8))
    assert newest(tmp_path)[0] == 7
    background.close()


def test_failures_are_told_and_three_end_it(tmp_path: Path):
    storage = SlowStorage(tmp_path, fails=True)
    storage.let.set()
    background = make(storage)
    with pytest.raises(CheckpointsFail, match="3 checkpoints in a row failed; the last: the disk"):
        for step in range(1, 9):
            background.step_done(step, lambda: ({}, share(state(1), 0, 1)))
    assert [outcome.reason for outcome in background.outcomes] == ["the disk is gone"] * 3
    background.close()


def test_the_interval_is_agreed_on(tmp_path: Path):
    """Rank 0's number decides: another rank, whose own clock says else, takes the same steps."""
    said: list[int] = []
    time_s = [0.0]

    def tell(value: int) -> int:
        said.append(value)
        return value

    first = make(LocalStorage(tmp_path), 0, agree=tell, now_s=lambda: time_s[0])
    steps = drive(first, time_s, 0.1)
    assert len(steps) > 3 and len(set(said)) > 1
    heard = iter(said)
    other_s = [0.0]
    second = make(
        LocalStorage(tmp_path / "b"), 0, agree=lambda _: next(heard), now_s=lambda: other_s[0]
    )
    assert drive(second, other_s, 3.0) == steps


def drive(background: BackgroundCheckpoints, time_s: list[float], iteration_s: float) -> list[int]:
    """200 steps; each checkpoint is durable before the next step ends."""
    begun = []
    for step in range(1, 201):
        time_s[0] += iteration_s * ((1.5 if step < 60 else 1.2) if background._busy else 1.0)
        if background.step_done(step, lambda: ({}, share(state(1), 0, 1))):
            begun.append(step)
        under_way = background._under_way
        if under_way is not None:
            under_way.result()
    background.close()
    return begun


def test_a_runs_states(tmp_path: Path):
    """As the run asks for them."""
    checkpoints = StoredCheckpoints(LocalStorage(tmp_path), keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        kept = TrainState(step, step * 8, state(step), {"corpus": "x", "n": 1.5})
        checkpoints.save(kept, LocalWorld())
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.samples, found.meta) == (3, 24, {"corpus": "x", "n": 1.5})
    assert is_state(found.tensors, 3)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.clear()
    assert checkpoints.newest() is None
    assert torch.equal(state(3)["scale"], found.tensors["scale"])
