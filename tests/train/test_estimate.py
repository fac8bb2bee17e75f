"""What a job is said to take: bytes by the table of ZeRO, seconds and memory by a rehearsal."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.train import tiny
from tests.train.processes import on_ranks
from tests.train.test_run import job, make
from train import estimate as estimating
from train import rehearsal
from train.estimate import moment_bytes, state_bytes
from train.folder import RunFolder
from train.rehearsal import LEAST, ROWS, WARM_UP, Rehearsal, measured
from train.step import StepReport
from train.weights import build_model, read_start
from train.world import GlooWorld, LocalWorld, World

WORKERS = 4
A_PARAMETER = {
    0: 2 + 4 + 4 + 8,  # our gradient without sharding is summed in float32
    1: 4 + 12 / WORKERS,
    2: 2 + 14 / WORKERS,
    3: 16 / WORKERS,
}
"""Bytes in bfloat16 with AdamW."""


def bytes_of(**tables: Any) -> float:
    """Of a worker's state, a parameter of the model."""
    wanted = tiny.job(precision={"compute": "bfloat16"}, workers={"count": WORKERS})
    wanted = wanted.model_copy(update={name: table for name, table in tables.items()})
    start = read_start(wanted)
    count = sum(p.numel() for p in build_model(wanted, start).parameters())
    wide = 8 if wanted.precision.compute == "float64" else 4
    return state_bytes(wanted, start, count, moment_bytes(wanted, start, wide)) / count


@pytest.mark.parametrize("stage", A_PARAMETER)
def test_a_workers_bytes_are_the_tables(stage: int):
    sharding = tiny.job().sharding.model_copy(update={"stage": stage})
    assert bytes_of(sharding=sharding) == pytest.approx(A_PARAMETER[stage], rel=1e-4)


def test_gemini_holds_copies_of_shares():
    """Its own share, and its own and another's in two versions while new copies are made."""
    sharding = tiny.job().sharding.model_copy(update={"stage": 1})
    resilience = tiny.job().resilience.model_copy(update={"mode": "gemini"})
    found = bytes_of(sharding=sharding, resilience=resilience)
    assert found == pytest.approx(2 + 4 + 12 / WORKERS * (1 + 2 * 2), rel=1e-4)


def test_a_pipelines_worker_has_its_stage():
    """In float64, of two stages: an embedding and both layers, whose work the output's comes near
    to, counted by hand."""
    wanted = tiny.job(model={"tied_head": False})
    pipeline = wanted.pipeline.model_copy(update={"stages": 2})
    names = {"model": wanted.model, "precision": wanted.precision, "pipeline": pipeline}
    ends, layer = 272 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    whole = 2 * ends + 2 * layer + 32
    assert bytes_of(**names) == pytest.approx(32 * (ends + 2 * layer) / whole)
    bamboo = wanted.resilience.model_copy(update={"mode": "bamboo"})
    assert bytes_of(**names, resilience=bamboo) == pytest.approx(32)  # two stages are all of it
    late = wanted.pipeline.model_copy(update={"stages": 2, "cuts": (0, 3)})
    assert bytes_of(**(names | {"pipeline": late})) == pytest.approx(
        32 * (ends + 2 * layer) / whole
    )
    early = wanted.pipeline.model_copy(update={"stages": 2, "cuts": (0, 1)})
    rest = ends + 2 * layer + 32
    assert bytes_of(**(names | {"pipeline": early})) == pytest.approx(32 * rest / whole)
    # A virtual worker's, with a bound of 1: weights and gradient; half of its stage's masters and
    # moments, which two workers serve; two waves that others still push to.
    ahead = wanted.workers.model_copy(update={"staleness": 1, "count": 4})
    found = bytes_of(**names, workers=ahead)
    assert found == pytest.approx((8 * 2 + 24 / 2 + 8 * 2) * (ends + 2 * layer) / whole)


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def test_a_rehearsal_times_whole_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step of 2 s (its first ones are slower), a checkpoint of 5 s, an evaluation of 8 s."""
    run, clock = make(job(tmp_path, "rehearsed")), Clock()
    monkeypatch.setattr(rehearsal, "time", clock)
    steps: list[bool] = []

    def step(world: World, stop: bool = False) -> StepReport:
        steps.append(stop)
        clock.now_s += 9.0 if len(steps) <= WARM_UP else 2.0
        return StepReport(len(steps), 0, 1.0, 1.0, 1.0, stop, [])

    def passing(seconds: float) -> Any:
        def act(world: World) -> None:
            clock.now_s += seconds

        return act

    monkeypatch.setattr(run.trainer, "step", step)
    monkeypatch.setattr(run, "save_now", passing(5.0))
    monkeypatch.setattr(run, "evaluate", passing(8.0))
    measured(run, LocalWorld())
    timed = LEAST + 1  # when the last of the fewest began, patience was not yet over
    assert len(steps) == WARM_UP + timed and steps[-1] and not any(steps[:-1])
    told = json.loads((run.folder.path / rehearsal.FILE).read_text())
    assert (told["step_s"], told["checkpoint_s"], told["row_s"]) == (2.0, 5.0, 8.0 / ROWS)
    assert told["took_s"] == 9.0 * WARM_UP + 2.0 * timed + 5.0 + 8.0


ONE_WORKER_MORE_BYTES = 64 << 20


class Large:
    """A run whose steps take memory for a moment, on rank 1 much; rss_bytes: as another reader of
    the kernel's numbers sees it meanwhile."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.trainer, self.rss_bytes = folder, self, 0

    def step(self, world: World, stop: bool = False) -> StepReport:
        held = torch.ones(world.rank * ONE_WORKER_MORE_BYTES // 4)
        self.rss_bytes = max(self.rss_bytes, psutil.Process().memory_info().rss)
        del held
        wish = torch.tensor([float(stop)])
        world.all_reduce(wish)
        return StepReport(0, 0, 1.0, 1.0, 1.0, bool(wish[0]), [])

    def save_now(self, world: World) -> None:
        torch.ones(2 * ONE_WORKER_MORE_BYTES // 4)  # not of training

    def evaluate(self, world: World) -> float:
        return 0.0


def rehearsed(world: GlooWorld, path: str) -> int:
    """What this rank took by another reader."""
    run: Any = Large(RunFolder(Path(path)))
    measured(run, world)
    return int(run.rss_bytes)


def test_a_rehearsal_tells_of_the_worker_that_takes_most(tmp_path: Path):
    """Neither rank 0's nor that of a checkpoint."""
    first, second = on_ranks(2, rehearsed, str(tmp_path))
    found = json.loads((tmp_path / rehearsal.FILE).read_text())["peak_bytes"]
    assert second - first > 0.8 * ONE_WORKER_MORE_BYTES
    assert second * 0.98 <= found < second + 0.3 * ONE_WORKER_MORE_BYTES


def test_all_of_a_run_is_counted(monkeypatch: pytest.MonkeyPatch):
    """10 steps of 2 s; checkpoints after 4 and 8 steps and at the end; evaluations of 3 sequences
    after 5, 10 and at the end; 20 s to start."""
    wanted = tiny.job(
        run={"tokens": 16 * 12 * 10},
        resilience={"checkpoint_every_steps": 4},
        report={"evaluate_every_steps": 5, "evaluate_tokens": 48},
    )
    found = Rehearsal(2.0, 5.0, 1.5, 20.0, peak_bytes=1 << 20, steps=5)
    monkeypatch.setattr(rehearsal, "rehearse", lambda job, start: found)
    told = estimating.estimate(wanted)
    assert told.step_s == 2.0
    assert told.hours * 3600 == pytest.approx(10 * 2.0 + 20.0 + 3 * 5.0 + 3 * 3 * 1.5)
    assert "2 workers on this machine" in told.how
    assert (told.peak_bytes, told.rehearsed_steps) == (1 << 20, 5)


def test_workers_elsewhere_are_not_rehearsed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "rehearse", None)
    told = estimating.estimate(tiny.job(workers={"where": "ray"}))
    assert told.step_s > 0 and "sums over workers" in told.how
    assert not told.peak_bytes  # no worker was looked at


@pytest.mark.live
@pytest.mark.slow
def test_a_rehearsal_on_real_workers_leaves_nothing(tmp_path: Path):
    wanted = job(tmp_path, "real", sharding={"stage": 3}, workers={"count": 2, "threads": 1})
    found = rehearsal.rehearse(wanted, read_start(wanted))
    assert min(found.step_s, found.checkpoint_s, found.row_s, found.start_s) > 0
    assert found.steps > WARM_UP and found.peak_bytes > 100 << 20  # torch alone
    assert not wanted.path.exists()
