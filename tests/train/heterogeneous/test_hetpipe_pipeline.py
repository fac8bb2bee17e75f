"""Jobs whose virtual workers are pipelines: two chains of two stages, bulk-synchronous at a bound
of 0, as far apart as a bound lets them, and their checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.heterogeneous import hetpipe_ranks as ranks
from tests.train.heterogeneous.test_hetpipe import OPTIMIZERS, every_sample_once, together
from tests.train.processes import on_ranks
from tests.train.test_learners import all_kinds, curve
from tests.train.test_run import job, losses, make
from train.commands import begin
from train.folder import RunFolder
from train.job import Job
from train.parallel.pipeline_job import PipelineLearner
from train.view import console_of_nobody
from train.weights import read_start
from train.world import GlooWorld, LocalWorld

RANKS, STAGES = 4, 2
CHAINED: dict[str, Any] = {"model": {"tied_head": False}, "pipeline": {"stages": STAGES}}
AHEAD = 10
"""Steps where workers are ahead of each other."""


def wanted(bound: int | None, steps: int = 6, **tables: Any) -> Job:
    return ranks.job(bound, steps, **CHAINED, **tables)


def piped(world: GlooWorld, job_: Job) -> dict[str, Any]:
    """The same job with a pipeline that sums gradients over its chains in each step."""
    learner = PipelineLearner(job_, read_start(job_), ranks.stream(job_))
    learner.enter(world)
    found = [learner.step(world).loss for _ in range(job_.steps)]
    held = learner.trainer.held
    tensors = {name: t for layer in held.modules for name, t in held.tensors(layer).items()}
    weights = {n.removeprefix("param/"): t.numpy() for n, t in tensors.items() if "param/" in n}
    return {"losses": found, "named": weights}


def stops(world: GlooWorld, bound: int, at: int) -> list[bool]:
    """Which steps say that somebody has asked for an end, after rank 3 did in step `at`."""
    learner = ranks.entered(world, wanted(bound, 8))
    return [learner.step(world, world.rank == 3 and n == at).stop for n in range(8)]


Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
MOMENTUM = "sgd with momentum"
CALLS: Calls = {
    "bound 0": (ranks.trained, (wanted(0),)),
    "bound 0, momentum": (ranks.trained, (wanted(0, optimizer=OPTIMIZERS[MOMENTUM]),)),
    "together": (piped, (wanted(None),)),
    "bound 1": (ranks.trained, (wanted(1, AHEAD), 0.0, 1)),
    "no bound": (ranks.trained, (wanted(1, AHEAD), 0.0, 2, True)),
    "a stop": (stops, (2, 3)),
}


def all_calls(world: GlooWorld, calls: Calls) -> dict[str, Any]:
    """One after another, so that the processes start once."""
    return {name: function(world, *given) for name, (function, given) in calls.items()}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    """What each rank answers to each call."""
    found = on_ranks(RANKS, all_calls, CALLS)
    return {name: [of_rank[name] for of_rank in found] for name in CALLS}


@pytest.mark.parametrize(("call", "name"), [("", "adamw"), (", momentum", MOMENTUM)])
def test_bound_0_is_bulk_synchronous(call: str, name: str, answers: dict[str, Any]) -> None:
    """As one process with all samples of a step at once."""
    losses_, _ = together(ranks.job(None, 6, optimizer=OPTIMIZERS[name], model=CHAINED["model"]))
    for answer in answers[f"bound 0{call}"]:
        assert answer["losses"] == pytest.approx(losses_, abs=1e-12)
        assert set(answer["stale"]) == {0}


def test_bound_0_is_the_pipeline_whose_chains_wait_for_each_other(answers: dict[str, Any]) -> None:
    for mine, theirs in zip(answers["bound 0"], answers["together"], strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-9)
        assert mine["named"].keys() == theirs["named"].keys()
        for name, weights in theirs["named"].items():
            np.testing.assert_allclose(mine["named"][name], weights, rtol=0, atol=1e-9)


def test_the_bound_is_reached_and_never_exceeded_in_any_stage(answers: dict[str, Any]) -> None:
    found = answers["bound 1"]
    for answer, same in zip(found, found[:STAGES] * 2, strict=True):
        assert max(answer["stale"]) == 1 and min(answer["stale"]) >= 0
        np.testing.assert_array_equal(answer["weights"], same["weights"])
    every_sample_once(found[::STAGES], wanted(1, AHEAD))  # samples enter at first stages


def test_a_bound_that_no_stage_keeps_is_noticed(answers: dict[str, Any]) -> None:
    """The mutation: servers that let everybody read."""
    assert max(stale for answer in answers["no bound"] for stale in answer["stale"]) > 1


def test_a_stage_sends_its_own_layers_to_who_has_them_too(answers: dict[str, Any]) -> None:
    """Half of its gradient and of its weights to the one other, each step; the weights once more at
    the end, when all come together."""
    for answer in answers["bound 0"]:
        assert answer["sent"] == pytest.approx((6 + 0.5) * answer["dense"], rel=0.02)
        assert answer["dense"] == pytest.approx(8 * len(answer["weights"]), rel=1e-3)


def test_a_stop_is_heard_by_all_stages_after_the_same_step(answers: dict[str, Any]) -> None:
    assert answers["a stop"] == [[step == 5 for step in range(8)]] * RANKS


KINDS: dict[str, dict[str, Any]] = {
    "chains": {**CHAINED, "workers": {"count": RANKS, "staleness": 0}},
    "chains-ahead": {**CHAINED, "workers": {"count": RANKS, "staleness": 1}},
    "pipeline": {**CHAINED, "workers": {"count": RANKS}},
    "whole": {"model": CHAINED["model"], "workers": {"count": RANKS}},
}


def begun(path: Path, kind: str, part: str, steps: int) -> Job:
    tables = {
        **KINDS[kind],
        "run": {"tokens": 16 * 12 * steps, "deterministic": kind != "chains-ahead"},
        "optimizer": {"learning_rate": 0.01, "clip_norm": 0.0},
        "schedule": {"name": "constant"},
    }
    found = job(path, f"{part}-{kind}", **tables)
    begin(found, RunFolder(found.path), console_of_nobody())
    return found


def test_it_goes_on_from_anothers_checkpoint_and_others_from_its_own(tmp_path: Path) -> None:
    """Runs of jobs, from text to exported folder. Bound 0: one curve with everybody else. Bound 1:
    stopped in the middle, it goes on, every step once, and learns."""
    pairs = [("chains", "whole"), ("pipeline", "chains"), ("chains-ahead", "chains-ahead")]
    halves = [begun(tmp_path, first, "half", 3) for first, _ in pairs]
    on_ranks(RANKS, all_kinds, [str(each.path) for each in halves])
    rest = [begun(tmp_path / "rest", second, "rest", 6) for _, second in pairs]
    for half, after in zip(halves, rest, strict=True):
        (half.path / "checkpoints").rename(after.path / "checkpoints")
    assert on_ranks(RANKS, all_kinds, [str(each.path) for each in rest]) == [[3] * 3] * RANKS
    reference = make(
        job(
            tmp_path,
            "reference",
            model=CHAINED["model"],
            optimizer={"learning_rate": 0.01, "clip_norm": 0.0},
            schedule={"name": "constant"},
            workers={"count": 1},
        )
    )
    reference.run(LocalWorld())
    bits = reference.folder.status().bits_per_byte
    for half, after in zip(halves[:2], rest[:2], strict=True):
        assert curve(half.path) + curve(after.path) == pytest.approx(losses(reference), abs=1e-9)
        assert RunFolder(after.path).status().bits_per_byte == pytest.approx(bits, abs=1e-9)
    late = curve(halves[2].path) + curve(rest[2].path)
    assert len(late) == 6 and late[-1] < late[0] and torch.tensor(late).isfinite().all()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bfloat16": ({"precision": {"compute": "bfloat16"}}, "keeps no masters"),
    "adafactor": (
        {"optimizer": {"name": "adafactor", "clip_norm": 0.0}},
        '"adamw" or "sgd" is accepted',
    ),
    "shares by speed": ({"shares": "measured"}, "pipeline.stages = 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_chains_do_not_go_with_is_named(name: str) -> None:
    tables, said = REFUSED[name]
    with pytest.raises(ValueError) as error:
        wanted(1, **tables)
    assert said in str(error.value)


def test_only_servers_update_a_pipeline_by_sgd() -> None:
    """Without a bound stages update their layers themselves, by AdamW."""
    assert wanted(1, optimizer=ranks.SGD).pipeline.stages == STAGES
    with pytest.raises(ValueError, match='updates layer by layer: optimizer.name = "adamw" is'):
        wanted(None, optimizer=ranks.SGD)
