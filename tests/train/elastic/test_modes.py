"""Each resilience mode of a job's file, with a worker killed by -9: the others go on, and losses
are those of one process that nobody disturbed."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_run import job, losses, make
from train.commands import begin
from train.elastic.job import PRELOAD, part, supervise
from train.elastic.process import Part, ProcessLauncher
from train.elastic.stages import PipelineKeeper
from train.folder import RunFolder, read_lines
from train.job import Job
from train.view import console_of_nobody
from train.world import LocalWorld

pytestmark = pytest.mark.live
STEPS = 24
UNTIED = {"model": {"tied_head": False}}
LONG: dict[str, Any] = {"run": {"tokens": 16 * 12 * STEPS}}
MODES: dict[str, dict[str, Any]] = {
    "gemini": {"sharding": {"stage": 1}},
    "bamboo": {"pipeline": {"stages": 3}, **UNTIED},
    "oobleck": {"pipeline": {"stages": 1}, **UNTIED},
    "varuna": {"pipeline": {"stages": 2}, **UNTIED},
}
EVERY = {"gemini": 0, "bamboo": 0, "oobleck": 0, "varuna": 4}
"""Steps between checkpoints: only Varuna needs any."""
SLOW = ("oobleck", "varuna")


def wanted(path: Path, mode: str, every: int | None = None) -> Job:
    settings: dict[str, Any] = {**LONG, **MODES[mode]}
    settings["workers"] = {"count": 3, "threads": 1, "where": "elastic"}
    every = EVERY[mode] if every is None else every
    return job(path, mode, resilience={"mode": mode, "checkpoint_every_steps": every}, **settings)


class Killer:
    """Kills workers once the metrics have come so far; a watcher of the launch."""

    def __init__(
        self, folder: RunFolder, launcher: ProcessLauncher, step: int, *victims: str
    ) -> None:
        self._folder, self._launcher, self._step = folder, launcher, step
        self._victims = victims
        self.killed = False

    def __call__(self) -> None:
        noted = self._folder.read_metrics()
        if noted and noted[-1]["step"] >= self._step and not self.killed:
            for pid in [self._launcher.pid(name) for name in self._victims]:
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            self.killed = True


def disturbed(
    job_: Job, *victims: str, step: int = 5, build: Callable[..., Part] = part
) -> tuple[RunFolder, list[dict[str, Any]]]:
    """A whole run in which workers are killed; its folder, and what workers said when they went on
    in later generations."""
    folder = RunFolder(job_.path)
    begin(job_, folder, console_of_nobody())
    launcher = ProcessLauncher(partial(build, folder.path.resolve(), 1), preload=PRELOAD)
    killer = Killer(folder, launcher, step, *victims)
    supervise(job_, folder, launcher, killer)
    assert killer.killed and folder.status().phase == "finished"
    events = [line["event"] for line in read_lines(folder.log / "events.jsonl")]
    resumed = [e for e in events if isinstance(e, dict) and e["kind"] == "resumed"]
    return folder, [e for e in resumed if e["generation"] > 1]


def lost(resumed: list[dict[str, Any]]) -> list[str]:
    """What could not be saved, in words."""
    return [words for event in resumed for words in event["lost"]]


def refuse_another_curve(folder: RunFolder, expected: list[float]) -> None:
    """Every step once, with its loss and all its samples."""
    lines = [line for line in folder.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-9)
    sampled = read_lines(folder.samples)
    assert [line["step"] for line in sampled] == list(range(1, STEPS + 1))
    assert {len(set(line["ids"])) for line in sampled} == {12}


def alone(path: Path) -> dict[bool, list[float]]:
    """One process's losses, by whether head and embedding are tied."""
    found = {}
    for tied in (True, False):
        run = make(job(path, f"tied-{tied}", model={"tied_head": tied}, **LONG))
        run.run(LocalWorld())
        found[tied] = losses(run)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """One process's losses, by whether head and embedding are tied."""
    return alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MODES]
)
@pytest.mark.parametrize("victim", ["w1", pytest.param("w0", marks=pytest.mark.slow)])
def test_a_killed_worker_changes_nothing(
    mode: str, victim: str, tmp_path: Path, expected: dict[bool, list[float]]
):
    job_ = wanted(tmp_path, mode)
    folder, resumed = disturbed(job_, victim)
    refuse_another_curve(folder, expected[job_.model.tied_head])
    assert resumed
    if mode == "varuna":
        assert all(event["store_bytes"] for event in resumed)
        assert all("from the checkpoint of step" in words for words in lost(resumed))
    else:
        assert lost(resumed) == [], "nothing was made twice"
        assert not any(event["store_bytes"] for event in resumed), "no checkpoint was read"


MEMORY: dict[str, dict[str, Any]] = {
    "recompute": {"activations": "recompute"},
    "mesa": {"activations": "mesa"},
    "cpu": {"offload": "cpu"},
    "disk": {"offload": "disk"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "mesa" else pytest.mark.slow) for n in MEMORY]
)
def test_workers_with_less_memory_outlive_each_other(
    name: str, tmp_path: Path, expected: dict[bool, list[float]]
):
    """Whoever comes is sent all of the state, from files or in few bits though it be."""
    workers = {"count": 3, "threads": 1, "where": "elastic"}
    job_ = job(tmp_path, name, workers=workers, memory=MEMORY[name], **LONG)
    folder, resumed = disturbed(job_, "w1")
    assert resumed and lost(resumed) == []
    if name != "mesa":
        refuse_another_curve(folder, expected[True])
        return
    found = [line["loss"] for line in folder.read_metrics() if "loss" in line]
    assert found == pytest.approx(expected[True], rel=0.05), "in few bits, but the same run"


def part_that_forgets(path: Path, threads: int, name: str) -> Part:
    """The mutation: nobody takes over."""
    PipelineKeeper._go_on = lambda self, plan, world: None  # type: ignore[method-assign]
    return part(path, threads, name)


@pytest.mark.slow
def test_without_taking_over_steps_are_made_again(
    tmp_path: Path, expected: dict[bool, list[float]]
):
    folder, resumed = disturbed(wanted(tmp_path, "bamboo"), "w1", build=part_that_forgets)
    said = lost(resumed)
    assert said and all("are made again from the first weights" in words for words in said)
    refuse_another_curve(folder, expected[False])


@pytest.mark.slow
def test_neighbours_lost_together_need_a_checkpoint_and_it_is_said(
    tmp_path: Path, expected: dict[bool, list[float]]
):
    folder, resumed = disturbed(wanted(tmp_path, "bamboo", every=2), "w1", "w2")
    said = lost(resumed)
    assert any("are lost: stage 1 (rank 1) and stage 2 (rank 2) went" in words for words in said)
    assert all(event["store_bytes"] for event in resumed)
    refuse_another_curve(folder, expected[False])


@pytest.mark.slow
def test_gemini_without_a_whole_group_goes_back_to_the_checkpoint_and_says_so(
    tmp_path: Path, expected: dict[bool, list[float]]
):
    """Three workers with two copies are a ring: two neighbours hold all of one share."""
    folder, resumed = disturbed(wanted(tmp_path, "gemini", every=2), "w0", "w1")
    assert any("nobody who is left holds it" in words for words in lost(resumed))
    refuse_another_curve(folder, expected[True])
