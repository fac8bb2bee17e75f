"""`[memory]` in a job: what a run makes of it, what `--dry-run` says, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.train import tiny
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.estimate import estimate
from train.folder import RunFolder
from train.job import Job, read_job
from train.run import Run
from train.view import console_of_nobody, estimate_table
from train.world import LocalWorld

WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"activations": "recompute"},
    "mesa": {"activations": "mesa"},
    "gact": {"activations": "gact", "bits": 5},
    "cpu": {"offload": "cpu"},
    "cpu, late, mapped, mesa": {
        "offload": "cpu",
        "late_from_step": 2,
        "folder": "host",
        "activations": "mesa",
    },
    "disk": {"offload": "disk"},
}
EXACT = ("recompute", "cpu", "disk")


def job(place: Path, name: str, **memory: Any) -> Job:
    texts = tiny.write_texts(place / "texts")
    if "folder" in memory:
        memory["folder"] = str(place / memory["folder"])
    return tiny.job(
        name=name,
        folder=place,
        data={"sources": (str(texts),)},
        run={"tokens": 16 * 12 * 4},
        memory=memory,
    )


def started(wanted: Job) -> Run:
    folder = RunFolder(wanted.path)
    begin(wanted, folder, console_of_nobody())
    run = Run(wanted, folder, open_checkpoints(wanted, folder.checkpoints))
    run.resume()
    return run


def losses(wanted: Job) -> list[float]:
    return [entry["loss"] for entry in RunFolder(wanted.path).read_metrics() if "loss" in entry]


@pytest.mark.parametrize("name", WAYS)
def test_a_run_stops_and_goes_on(name: str, tmp_path: Path):
    """In two parts, with checkpoint, evaluation and export, as in one; and near a plain run."""
    whole, parts = (job(tmp_path, n, **WAYS[name]) for n in ("whole", "parts"))
    assert started(whole).run(LocalWorld()) == "finished"
    first = started(parts)
    first.folder.ask_to_stop()
    assert first.run(LocalWorld()) == "stopped"
    assert started(parts).run(LocalWorld()) == "finished"
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    plain = job(tmp_path, "plain")
    started(plain).run(LocalWorld())
    near = 1e-12 if name in EXACT else 0.1
    assert losses(whole) == pytest.approx(losses(plain), rel=near)
    if name not in EXACT:
        assert losses(whole) != losses(plain)
    assert (whole.path / "model.safetensors").stat().st_size > 0


SAID = {
    "recompute": ["layers' activations", "with memory.activations = recompute"],
    "gact": ["with memory.activations = gact"],
    "cpu": ["device", "no device is here", "plain memory", "a step between them"],
    "disk": ["files", "read and", "written a step and worker"],
}


@pytest.mark.usefixtures("unrehearsed")
@pytest.mark.parametrize("name", SAID)
def test_a_dry_run_says_it(name: str, tmp_path: Path):
    wanted = job(tmp_path, "dry", **WAYS[name])
    console = Console(record=True, width=200)
    console.print(estimate_table(wanted, estimate(wanted)))
    said = console.export_text()
    assert all(words in said for words in SAID[name]), said


def test_a_rehearsal_leaves_no_files(tmp_path: Path):
    wanted = job(tmp_path, "dry", **WAYS["disk"])
    assert estimate(wanted).step_s > 0
    assert not (wanted.path / "offload").exists()


@pytest.mark.usefixtures("unrehearsed")
def test_a_plain_dry_run_says_nothing_of_it(tmp_path: Path):
    assert estimate(job(tmp_path, "dry")).memory == {}


REFUSED = {
    "memory.bits = 4\nmemory.activations = 'mesa'": "mesa has 8",
    "memory.bits = 0": "greater than or equal to 1",
    "memory.activations = 'gact'\nmemory.offload = 'disk'": "computes layers again",
    "memory.offload = 'tape'": "'none', 'cpu' or 'disk'",
    "memory.offload = 'cpu'\noptimizer.name = 'adafactor'": 'needs optimizer.name = "adamw"',
    "memory.late_from_step = 2": 'needs offload = "cpu"',
    "memory.offload = 'cpu'\nmemory.late_from_step = 2\nworkers.where = 'ray'": '"local"',
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_named(text: str, tmp_path: Path):
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_job(tmp_path / "job.toml")
    assert REFUSED[text] in str(error.value)


def test_the_folder_is_the_jobs_files(tmp_path: Path):
    (tmp_path / "job.toml").write_text("memory.folder = 'fast'\nmemory.offload = 'disk'")
    assert read_job(tmp_path / "job.toml").memory.folder == str(tmp_path / "fast")
