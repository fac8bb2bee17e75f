"""Whoever holds the state, whole or in part: one curve, one kind of checkpoint, one moment in which
the state begins to change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.processes import on_ranks
from tests.train.test_run import job, losses, make
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.elastic.shares import SharedAdamW
from train.folder import RunFolder
from train.job import Job
from train.run import Run
from train.view import console_of_nobody
from train.world import GlooWorld, LocalWorld, World

RANKS = 2
STEPS = 6
UNTIED = {"model": {"tied_head": False}}
KINDS: dict[str, dict[str, Any]] = {
    "stage 1": {"sharding": {"stage": 1}},
    "stage 2": {"sharding": {"stage": 2}},
    "stage 3": {"sharding": {"stage": 3}},
    "gemini's shares": {
        "sharding": {"stage": 1},
        "resilience": {"mode": "gemini"},
        "workers": {"count": RANKS, "where": "elastic"},
    },
    "pipeline": {"pipeline": {"stages": 2}},
}


def wanted(path: Path, kind: str, **tables: Any) -> Job:
    settings: dict[str, Any] = {"workers": {"count": RANKS}, **UNTIED, **KINDS[kind], **tables}
    found = job(path, kind.replace(" ", "-").replace("'", ""), **settings)
    begin(found, RunFolder(found.path), console_of_nobody())
    return found


def follow(world: World, path: str, fault: str = "") -> int:
    """A worker of the run in a folder, from where it is to its end; the step it went on from."""
    folder = RunFolder(Path(path))
    if fault:
        SharedAdamW._publish = lambda self: None  # type: ignore[method-assign]
    job_ = folder.job()
    run = Run(job_, folder, open_checkpoints(job_, folder.checkpoints))
    run.resume(world)
    found = run.trainer.step_number
    run.run(world)
    return found


def all_kinds(world: GlooWorld, folders: list[str]) -> list[int]:
    """One after another, so that the processes start once."""
    return [follow(world, path) for path in folders]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One worker that holds everything."""
    run = make(job(tmp_path_factory.mktemp("whole"), "whole", **UNTIED))
    run.run(LocalWorld())
    return run


def curve(path: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(path).read_metrics() if "loss" in line]


def test_all_have_one_curve_and_each_goes_on_from_anothers_checkpoint(tmp_path: Path, whole: Run):
    """On two workers to the middle; then each kind from the checkpoint of another one, on two; at
    the end one worker that holds everything finds the last one's finished state."""
    half = {"run": {"tokens": 16 * 12 * 3}, "schedule": {"name": "constant"}}
    full = {"schedule": {"name": "constant"}}
    reference = make(job(tmp_path, "reference", **UNTIED, **full))
    reference.run(LocalWorld())
    halves = [wanted(tmp_path / "half", kind, **half) for kind in KINDS]
    on_ranks(RANKS, all_kinds, [str(job_.path) for job_ in halves])
    rest = []
    for kind, before in zip(KINDS, [*halves[1:], halves[0]], strict=True):
        job_ = wanted(tmp_path / "rest", kind, **full)
        (before.path / "checkpoints").rename(job_.path / "checkpoints")
        rest.append(job_)
    steps = on_ranks(RANKS, all_kinds, [str(job_.path) for job_ in rest])
    assert steps == [[3] * len(KINDS)] * RANKS
    for first, second in zip(halves, rest, strict=True):
        found = curve(first.path) + curve(second.path)
        assert found == pytest.approx(losses(reference), abs=1e-9), second.name
        bits = RunFolder(second.path).status().bits_per_byte
        assert bits == pytest.approx(reference.folder.status().bits_per_byte, abs=1e-9)
    again = rest[-1].model_copy(update={"pipeline": Job().pipeline})
    run = Run(again, RunFolder(again.path), open_checkpoints(again, again.path / "checkpoints"))
    run.resume()
    assert run.trainer.step_number == STEPS
    ours, theirs = (r.trainer.exported(LocalWorld()) for r in (run, reference))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_without_the_others_weights_shares_have_another_curve(tmp_path: Path, whole: Run):
    job_ = wanted(tmp_path, "gemini's shares")
    on_ranks(RANKS, follow, str(job_.path), "nobody publishes")
    assert curve(job_.path) != pytest.approx(losses(whole), abs=1e-6)


ALONE: dict[str, dict[str, Any]] = {
    "whole": {},
    "stage 2": {"sharding": {"stage": 2}},
    "pipeline": {"pipeline": {"stages": 1}},
}


@pytest.mark.parametrize("kind", ALONE)
def test_the_state_changes_after_it_was_announced(kind: str, tmp_path: Path):
    """What a checkpoint that is written beside training rests on."""
    run = make(job(tmp_path, "told", workers={"count": 1}, **UNTIED, **ALONE[kind]))
    seen: list[torch.Tensor] = []

    def weights() -> torch.Tensor:
        return torch.cat([p.data.flatten().clone() for p in run.trainer.pieces(LocalWorld())])

    run.trainer.before_update = lambda: seen.append(weights())
    for _ in range(2):
        before = weights()
        run.trainer.step(LocalWorld())
        assert torch.equal(seen[-1], before) and not torch.equal(weights(), before)
    assert len(seen) == 2


def test_checkpoints_beside_training_change_nothing_and_are_gone_on_from(
    tmp_path: Path, whole: Run
):
    """resilience.mode = "checkfreq": a process that is gone in the middle costs the steps since."""
    long = {"run": {"tokens": 16 * 12 * 24}, **UNTIED}
    plain = make(job(tmp_path, "plain", resilience={"mode": "none"}, **long))
    plain.run(LocalWorld())
    assert plain.saving.saved_step == 24 and not (plain.folder.log / "checkpoints.jsonl").exists()
    beside = {"mode": "checkfreq", "slowdown": 1.0}
    wanted_ = job(tmp_path, "beside", resilience=beside, **long)
    run = make(wanted_)
    run.begin(LocalWorld())
    while run.saving.saved_step < 0 or run.trainer.step_number < 12:
        run._after(run.trainer.step(LocalWorld()), LocalWorld())
    assert run.saving._beside is not None
    run.saving._beside.finish()  # and then its process is gone, at some later step
    again = make(wanted_)
    assert 0 < again.trainer.step_number < 24
    assert again.run(LocalWorld()) == "finished"
    assert losses(again) == losses(plain)
    told = (again.folder.log / "checkpoints.jsonl").read_text()
    assert '"persist_s"' in told and '"failure": ""' in told
