"""A real job (a small Llama in float64 on text) on elastic workers: killed, and the same in the end
as in one process."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_run import job, losses, make
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.elastic.job import PRELOAD, launch, part, supervise
from train.elastic.process import ProcessLauncher
from train.elastic.run import ElasticRun
from train.folder import RunFolder, read_lines
from train.job import Job
from train.local import WorkerFailed
from train.view import console_of_nobody
from train.world import LocalWorld

pytestmark = pytest.mark.live
LONG = {"run": {"tokens": 16 * 12 * 14}, "workers": {"count": 2, "threads": 1}}


def prepared(wanted: Job) -> RunFolder:
    folder = RunFolder(wanted.path)
    begin(wanted, folder, console_of_nobody())
    return folder


class KillOne:
    """Kills a worker once some steps are in the metrics; a watcher of the launch."""

    def __init__(self, folder: RunFolder, launcher: ProcessLauncher) -> None:
        self._folder, self._launcher = folder, launcher
        self.killed = False

    def __call__(self) -> None:
        done = self._folder.path.exists() and len(self._folder.read_metrics()) >= 3
        pid = self._launcher.pid("w0")
        if done and pid and not self.killed:
            self.killed = True
            os.kill(pid, signal.SIGKILL)


def test_a_real_job_survives_the_loss_of_its_first_worker(tmp_path: Path):
    alone = make(job(tmp_path, "alone", **LONG))
    assert alone.run(LocalWorld()) == "finished"
    wanted = job(tmp_path, "elastic", resilience={"checkpoint_every_steps": 0}, **LONG)
    folder = prepared(wanted)
    launcher = ProcessLauncher(partial(part, folder.path.resolve(), 1), preload=PRELOAD)
    killer = KillOne(folder, launcher)
    supervise(wanted, folder, launcher, killer)
    assert killer.killed
    found = [line["loss"] for line in folder.read_metrics() if "loss" in line]
    assert len(found) == 14 and found == pytest.approx(losses(alone), abs=1e-9)
    assert folder.status().phase == "finished"
    ours, theirs = (
        load_file(path / "model.safetensors") for path in (folder.path, alone.folder.path)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-7, rtol=0)
    events = (folder.log / "events.jsonl").read_text()
    assert events.count('"kind":"plan"') >= 2 and '"gone"' in events


def test_a_step_whose_line_was_lost_with_its_writer_is_noted_by_the_next(tmp_path: Path):
    wanted = job(tmp_path, "torn", resilience={"checkpoint_every_steps": 0}, **LONG)
    folder = prepared(wanted)
    one, other = (
        ElasticRun(wanted, folder, open_checkpoints(wanted, folder.checkpoints)) for _ in range(2)
    )
    for _ in range(3):
        one.step(LocalWorld())
    whole = folder.read_metrics()
    folder.drop_metrics_after(2)  # as if killed before it wrote the third
    folder.drop_samples_after(2)
    other.load(one.state())
    other.step(LocalWorld(generation=1))
    found = folder.read_metrics()
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[2]["loss"] == whole[2]["loss"]
    sampled = read_lines(folder.samples)
    assert [line["step"] for line in sampled] == [1, 2, 3, 4]
    assert [n for line in sampled for n in line["ids"]] == other.stream.ids(0, 4 * 12)


@pytest.mark.slow
def test_a_person_stops_it_and_it_goes_on(tmp_path: Path):
    wanted = job(tmp_path, "stopped", **LONG)
    folder = prepared(wanted)
    folder.ask_to_stop()
    launch(wanted, folder, lambda: None)
    assert folder.status().phase == "stopped" and folder.status().step == 1
    prepared(wanted)
    launch(wanted, folder, lambda: None)
    assert folder.status().phase == "finished" and folder.status().step == 14


@pytest.mark.slow
def test_an_error_of_the_job_is_told(tmp_path: Path):
    wanted = job(tmp_path, "wrong", **LONG)
    folder = prepared(wanted)
    folder.corpus.rename(tmp_path / "elsewhere")
    with pytest.raises(WorkerFailed):
        launch(wanted, folder, lambda: None)
