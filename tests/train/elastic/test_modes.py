"""Each resilience mode of a job's file, with a worker killed by -9: the others go on, and the losses
are those of a run that nobody disturbed."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_run import job, losses, make
from train.commands import begin
from train.elastic.job import PRELOAD, part, supervise
from train.elastic.process import ProcessLauncher
from train.folder import RunFolder, read_lines
from train.job import Job
from train.view import console_of_nobody
from train.world import LocalWorld

pytestmark = pytest.mark.live
STEPS = 40
UNTIED = {"model": {"tied_head": False}}
LONG: dict[str, Any] = {"run": {"tokens": 16 * 12 * STEPS}}
MODES: dict[str, dict[str, Any]] = {
    "gemini": {"workers": {"count": 3}, "sharding": {"stage": 1}},
    "bamboo": {"workers": {"count": 3}, "pipeline": {"stages": 3}, **UNTIED},
    "oobleck": {"workers": {"count": 3}, "pipeline": {"stages": 1}, **UNTIED},
    "varuna": {"workers": {"count": 3}, "pipeline": {"stages": 2}, **UNTIED},
}
KEPT = {"gemini": 0, "bamboo": 0, "oobleck": 0, "varuna": 4}
"""Steps between checkpoints: only Varuna needs any."""


def wanted(path: Path, mode: str, **tables: Any) -> Job:
    settings = {**LONG, **MODES[mode], **tables}
    settings["workers"] = {**settings["workers"], "threads": 1, "where": "elastic"}
    resilience = {"mode": mode, "checkpoint_every_steps": KEPT[mode]}
    return job(path, mode, resilience=resilience, **settings)


class Killer:
    """Kills workers when the metrics have come so far; a watcher of the launch."""

    def __init__(self, folder: RunFolder, launcher: ProcessLauncher, due: dict[int, str]) -> None:
        self._folder, self._launcher, self._due = folder, launcher, dict(due)
        self.pids: dict[str, int] = {}

    def __call__(self) -> None:
        for name in ("w0", "w1", "w2"):
            if name not in self.pids and (pid := self._launcher.pid(name)):
                self.pids[name] = pid
        noted = self._folder.read_metrics()
        for step in [step for step in self._due if noted and noted[-1]["step"] >= step]:
            os.kill(self.pids[self._due.pop(step)], signal.SIGKILL)


def disturbed(job_: Job, due: dict[int, str]) -> tuple[RunFolder, list[dict[str, Any]]]:
    """A whole run in which workers are killed; its folder and its supervisor's log."""
    folder = RunFolder(job_.path)
    begin(job_, folder, console_of_nobody())
    launcher = ProcessLauncher(partial(part, folder.path.resolve(), 1), preload=PRELOAD)
    killer = Killer(folder, launcher, due)
    supervise(job_, folder, launcher, killer)
    assert not killer._due, "all were killed"
    return folder, read_lines(folder.log / "events.jsonl")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """One process's losses, by whether head and embedding are tied."""
    path = tmp_path_factory.mktemp("alone")
    found = {}
    for tied in (True, False):
        run = make(job(path, f"tied-{tied}", model={"tied_head": tied}, **LONG))
        run.run(LocalWorld())
        found[tied] = losses(run)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_worker_changes_nothing(
    mode: str, tmp_path: Path, expected: dict[bool, list[float]]
):
    job_ = wanted(tmp_path, mode)
    folder, events = disturbed(job_, {6: "w1"})
    lines = [line for line in folder.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    found = [line["loss"] for line in lines]
    assert found == pytest.approx(expected[job_.model.tied_head], abs=1e-9)
    sampled = read_lines(folder.samples)
    assert [line["step"] for line in sampled] == list(range(1, STEPS + 1))
    plans = [e["event"] for e in events if isinstance(e["event"], dict) and "ranks" in e["event"]]
    print(mode, json.dumps([(p["ranks"], p["lost"]) for p in plans]))
    print([e["event"].get("lost") for e in events if isinstance(e["event"], dict) and e["event"]["kind"]=="resumed"])
    assert folder.status().phase == "finished"
