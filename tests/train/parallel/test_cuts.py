"""Stages that a job cuts itself, and the cuts that the search over unlike devices finds for it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.train.advise import test_advise as advice
from tests.train.processes import on_ranks
from tests.train.test_run import job, losses, make
from train.advise.amp import DeviceKind
from train.advise.cost import Pricer
from train.advise.ranking import advise
from train.advise.view import told_as_toml
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.folder import RunFolder
from train.job import Job
from train.parallel.pipeline_job import PipelineLearner
from train.parallel.pipeline_layout import Span, cut_spans
from train.run import Run
from train.view import console_of_nobody
from train.weights import read_start
from train.world import GlooWorld, LocalWorld

UNTIED = {"model": {"tied_head": False}}
CUTS: tuple[tuple[int, ...], ...] = ((0, 1), (0, 3), ())


def follow(world: GlooWorld, folders: list[str]) -> list[list[int]]:
    """Runs one job after another; the layers that this rank held in each."""
    found = []
    for path in folders:
        folder = RunFolder(Path(path))
        run = Run(folder.job(), folder, open_checkpoints(folder.job(), folder.checkpoints))
        run.resume(world)
        run.run(world)
        assert isinstance(run.trainer, PipelineLearner)
        found.append(sorted(run.trainer.trainer.held.modules))
    return found


def test_unequal_stages_train_as_one_process(tmp_path: Path):
    """In float64, within 1e-9; each worker holds the layers that the cuts say: the embedding alone,
    and norm and output alone. The mutation, no cuts, holds others."""
    whole = make(job(tmp_path, "whole", **UNTIED))
    whole.run(LocalWorld())
    jobs = [
        job(
            tmp_path,
            f"cut-{n}",
            workers={"count": 2},
            pipeline={"stages": 2, "cuts": cuts},
            **UNTIED,
        )
        for n, cuts in enumerate(CUTS)
    ]
    for one in jobs:
        begin(one, RunFolder(one.path), console_of_nobody())
    first, second = on_ranks(2, follow, [str(one.path) for one in jobs])
    assert first[:2] == [[0], [0, 1, 2]] and second[:2] == [[1, 2, 3], [3]]
    assert first[2] != first[0]
    for one in jobs:
        found = [line["loss"] for line in RunFolder(one.path).read_metrics() if "loss" in line]
        assert len(found) == 6 and found == pytest.approx(losses(whole), abs=1e-9)


def test_spans_begin_at_cuts():
    assert cut_spans(9, (0, 3, 7)) == (Span(0, 3), Span(3, 7), Span(7, 9))
    with pytest.raises(ValueError, match="layers 0 to 6 with its ends, so at most 6 is accepted"):
        cut_spans(7, (0, 3, 7))


PIPELINE: dict[str, Any] = {"model": {"layers": 2, "tied_head": False}, "workers": {"count": 2}}
REFUSED = {
    ((0, 1, 2), 2): "cuts = .0, 1, 2. begin 3 stages, but stages = 2: one layer for each",
    ((0, 1), 0): "begin 2 stages, but stages = 0",
    ((1, 2), 2): "must begin with 0 and rise",
    ((0, 0), 2): "must begin with 0 and rise",
    ((0, 4), 2): "has layers 0 to 3 with its ends, so at most 3 is accepted",
}


@pytest.mark.parametrize("given", REFUSED)
def test_cuts_that_make_no_stages_are_refused(given: tuple[tuple[int, ...], int], tmp_path: Path):
    cuts, stages = given
    with pytest.raises(ValueError, match=REFUSED[given]):
        job(tmp_path, "t", pipeline={"stages": stages, "cuts": cuts}, **PIPELINE)


def test_where_stages_change_cuts_are_refused(tmp_path: Path):
    workers = {"count": 2, "where": "elastic"}
    tables = PIPELINE | {"workers": workers, "resilience": {"mode": "varuna"}}
    with pytest.raises(ValueError, match=r"pipeline.cuts = \[\] is accepted, or workers.where"):
        job(tmp_path, "t", pipeline={"stages": 2, "cuts": (0, 1)}, **tables)


KINDS = (DeviceKind("fast", 1, 1.0, 1e12, 1e11), DeviceKind("slow", 1, 0.25, 1e12, 1e11))


def test_advice_is_a_job_that_runs_so():
    """Between one device and another of a quarter of its speed, pipelines have the cuts that their
    costs are of, as a file has them; by its own cuts such a job costs what was said, and by others
    more."""
    wanted = advice.job(2)
    machines, start = advice.machines(*KINDS, network=1e9), read_start(wanted)
    found = [one for one in advise(wanted, start, machines).ranked if one.job.pipeline.stages]
    assert found
    for advised in found:
        assert advised.cost.pipeline is not None
        cuts = tuple(stage.start for stage in advised.cost.pipeline.stages)
        assert advised.job.pipeline.cuts == advised.settings["pipeline.cuts"] == cuts
        tables = tomllib.loads("\n".join(told_as_toml({n: v}) for n, v in advised.settings.items()))
        assert tables["pipeline"]["cuts"] == list(cuts)
    first = found[0]
    pricer = Pricer(start, machines)
    assert pricer.cost(first.job).seconds == first.cost.seconds
    others = [
        pricer.cost(with_cuts(first.job, (0, cut))).seconds.total
        for cut in range(1, 6)
        if (0, cut) != first.job.pipeline.cuts
    ]
    assert len(others) == 4 and min(others) >= first.step_s and max(others) > 1.2 * first.step_s


def with_cuts(job_: Job, cuts: tuple[int, ...]) -> Job:
    return job_.model_copy(update={"pipeline": job_.pipeline.model_copy(update={"cuts": cuts})})
