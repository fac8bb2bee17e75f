"""TensorBoard's files as TensorBoard's own reader sees them, and the refusal without it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train import tiny
from train.checkpoints import open_checkpoints
from train.commands import begin, forget
from train.folder import RunFolder
from train.job import Job
from train.run import Run
from train.view import console_of_nobody
from train.world import LocalWorld

STEPS = 6


def asked(path: Path) -> Job:
    texts = tiny.write_texts(path / "texts")
    return tiny.job(
        name="t",
        folder=path,
        data={"sources": (str(texts),)},
        run={"tokens": 16 * 12 * STEPS},
        resilience={"checkpoint_every_steps": 2},
        report={"tensorboard": True},
    )


class Lost(Exception):
    """The process is gone."""


def run(job: Job, until: int = STEPS) -> None:
    """Trains to the end, or dies after step `until`, without a checkpoint of its own."""
    folder = RunFolder(job.path)
    begin(job, folder, console_of_nobody())
    training = Run(job, folder, open_checkpoints(job, folder.checkpoints))
    training.resume()
    note = training.journal.note

    def dying(report: Any) -> None:
        note(report)
        if report.step == until < STEPS:
            training.journal._board.flush()
            raise Lost

    training.journal.note = dying  # type: ignore[method-assign]
    training.run(LocalWorld())


def scalars(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder.board))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_shows_every_step_once(tmp_path: Path):
    """Also those that a lost process had shown, and that its successor repeats."""
    job = asked(tmp_path)
    folder = RunFolder(job.path)
    with pytest.raises(Lost):
        run(job, until=5)  # its last checkpoint is of step 4
    assert [step for step, _ in scalars(folder, "loss")] == [1, 2, 3, 4, 5]
    run(job)
    lines = [line for line in folder.read_metrics() if "loss" in line]
    for name in ("loss", "learning_rate", "gradient_norm"):
        shown = scalars(folder, name)
        assert [step for step, _ in shown] == [*range(1, STEPS + 1)]
        expected = [line[name] for line in lines]
        assert [value for _, value in shown] == pytest.approx(expected, rel=1e-6)
    ((step, bits),) = scalars(folder, "bits_per_byte")
    assert step == STEPS and bits == pytest.approx(folder.status().bits_per_byte)
    forget(folder)
    assert not folder.board.exists()


def test_without_the_purge_steps_are_shown_twice(tmp_path: Path, monkeypatch):
    """The mutation of what a resumed run tells TensorBoard."""
    from torch.utils import tensorboard

    real = tensorboard.SummaryWriter
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda path, purge_step: real(path))
    job = asked(tmp_path)
    with pytest.raises(Lost):
        run(job, until=5)
    run(job)
    assert [step for step, _ in scalars(RunFolder(job.path), "loss")].count(5) == 2


def test_only_the_rank_that_writes_makes_files(tmp_path: Path):
    job = asked(tmp_path)
    folder = RunFolder(job.path)
    begin(job, folder, console_of_nobody())
    Run(job, folder, open_checkpoints(job, folder.checkpoints))
    assert not folder.board.exists()


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"report\.tensorboard.*sanderling\[tensorboard\]"):
        run(asked(tmp_path))
