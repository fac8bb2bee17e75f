"""Each resilience mode with workers that are Ray's actors, one of them killed by -9: the curve is
that of one process that nobody disturbed."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.raylocal.session import RaySession
from cluster.settings import resolve
from tests.train.elastic.test_modes import EVERY, LONG, MODES, alone, lost, refuse_another_curve
from tests.train.test_run import job
from train.commands import begin
from train.elastic import job as elastic_job
from train.elastic.job import launch_on_ray
from train.folder import RunFolder, read_lines
from train.job import Job
from train.view import console_of_nobody

pytestmark = pytest.mark.live
CHECKED: dict[str, dict[str, Any]] = {**MODES, "checkfreq": {}}
WORKERS = 3


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RaySession]:
    """A CPU for each worker, and one for a replacement that starts before its dead is forgotten."""
    folder = tmp_path_factory.mktemp("data")
    flags = {"data_dir": str(folder), "ray.object_store_bytes": str(100 << 20)}
    with RaySession(resolve(flags=flags).settings, cpus=WORKERS + 1) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """One process's losses, by whether head and embedding are tied."""
    return alone(tmp_path_factory.mktemp("alone"))


def wanted(path: Path, mode: str) -> Job:
    workers = {"count": WORKERS, "threads": 1, "where": "ray"}
    resilience = {"mode": mode, "checkpoint_every_steps": EVERY.get(mode, 0)}
    tables = {**LONG, **CHECKED[mode], "workers": workers, "resilience": resilience}
    return job(path, mode, **tables)


class Killer:
    """Kills a worker by -9 once the metrics have come so far; a watcher of the launch."""

    def __init__(self, folder: RunFolder, name: str, step: int) -> None:
        self._folder, self._name, self._step = folder, name, step
        self.pid = 0

    def __call__(self) -> None:
        noted = self._folder.read_metrics()
        if self.pid or not noted or noted[-1]["step"] < self._step:
            return
        for line in read_lines(self._folder.log / "events.jsonl"):
            event = line["event"]
            if isinstance(event, dict) and event.get("worker") == self._name and "pid" in event:
                self.pid = int(event["pid"])
        os.kill(self.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(540)
@pytest.mark.parametrize("mode", CHECKED)
def test_a_killed_actor_changes_nothing(
    mode: str, session: RaySession, tmp_path: Path, expected: dict[bool, list[float]]
):
    job_ = wanted(tmp_path, mode)
    folder = RunFolder(job_.path)
    begin(job_, folder, console_of_nobody())
    killer = Killer(folder, "w1", 5)
    launch_on_ray(job_, folder, killer)
    assert killer.pid and killer.pid != os.getpid()
    assert folder.status().phase == "finished"
    refuse_another_curve(folder, expected[job_.model.tied_head])
    events = [line["event"] for line in read_lines(folder.log / "events.jsonl")]
    later = [e for e in events if isinstance(e, dict) and e["kind"] == "resumed"]
    later = [event for event in later if event["generation"] > 1]
    assert later, "the others went on without it"
    if mode == "varuna":
        assert all("from the checkpoint of step" in words for words in lost(later))
    else:
        assert lost(later) == [] and not any(event["store_bytes"] for event in later)
    pids = [e["pid"] for e in events if isinstance(e, dict) and e["kind"] == "hello"]
    assert len(pids) == len(set(pids)) <= WORKERS + 1, "survivors keep their processes"


def test_a_signal_to_stop_is_ours_after_ray_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`ray.init` sets a handler of SIGTERM that ends the process; a job that is stopped has to
    leave a checkpoint first."""
    job_, seen = wanted(tmp_path, "checkfreq"), list[object]()

    def init(*_: object, **__: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def mine(_signal: int, _frame: object) -> None: ...

    def supervise(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(elastic_job, "supervise", supervise)
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, mine)
    try:
        launch_on_ray(job_, RunFolder(job_.path), lambda: None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [mine]
