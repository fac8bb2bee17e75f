"""Proof rows of jobs with `[mesh]`: what `--dry-run` says of memory and time, against the job that
then runs.

Memory is a worker's greatest resident set while it trains, above that of a worker of the same job
with a model of nothing; the checkpoint and the export at a run's end are not in it. Time is that of
a step and of the whole job, from starting its workers to the last file.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.prove.row import Row
from tests.train import tiny
from train.commands import begin
from train.estimate import estimate
from train.folder import RunFolder
from train.job import Job
from train.local import launch
from train.parallel.mesh_plan import plan
from train.view import console_of_nobody
from train.weights import read_start

WORKERS, STEPS, WARM_UP = 4, 10, 2
MESHES: dict[str, dict[str, Any]] = {
    "dp x tp + sp": {"tensor": 2, "sequence_parallel": True},
    "fsdp x tp": {"tensor": 2, "full_shard": True},
    "ring x dp": {"sequence": 2},
}
LARGE = {"layers": 8, "hidden": 448, "heads": 14, "kv_heads": 14, "feed_forward": 1216}
SMALL = {"layers": 1, "hidden": 56, "heads": 14, "kv_heads": 14, "feed_forward": 32}
MEMORY, TIME = 0.10, 0.25


def rows() -> Iterator[Row]:
    """Two for each mesh; about five minutes."""
    torch.set_num_threads(1)
    for name, mesh in MESHES.items():
        with tempfile.TemporaryDirectory() as scratch:
            yield from _of_mesh(name, mesh, Path(scratch))


def _of_mesh(name: str, mesh: dict[str, Any], scratch: Path) -> Iterator[Row]:
    job = _job(scratch, "large", mesh, LARGE)
    said = plan(job, read_start(job).config).memory_bytes
    # Its steps are short: enough of them that somebody looks meanwhile.
    idle = ran(_job(scratch, "small", mesh, SMALL, 20 * STEPS)).peak_bytes
    told = estimate(job)
    found = ran(job)
    took = found.peak_bytes - idle
    yield Row(
        f"--dry-run, {name}: memory of a worker",
        f"within {MEMORY:.0%} of its growth",
        f"{said / took - 1:+.1%} ({said / 2**20:.0f} and {took / 2**20:.0f} MiB)",
        abs(said / took - 1) <= MEMORY,
    )
    step, whole = told.step_s / found.step_s - 1, told.hours * 3600 / found.whole_s - 1
    yield Row(
        f"--dry-run, {name}: time of a step, of the job",
        f"within {TIME:.0%}",
        f"{step:+.1%} ({told.step_s:.2f} and {found.step_s:.2f} s), {whole:+.1%} "
        f"({told.hours * 3600:.0f} and {found.whole_s:.0f} s)",
        abs(step) <= TIME and abs(whole) <= TIME,
    )


def _job(
    scratch: Path, name: str, mesh: dict[str, Any], model: dict[str, Any], steps: int = STEPS
) -> Job:
    texts = tiny.write_texts(scratch / "texts", 40)
    samples = 8
    return tiny.job(
        name=name,
        folder=scratch,
        model=model,
        data={"sources": (str(texts),), "sequence_tokens": 256},
        run={
            "tokens": 256 * samples * steps,
            "batch_tokens": 256 * samples,
            "micro_batch_tokens": 256 * 4,
        },
        precision={"compute": "float32"},
        workers={"count": WORKERS, "threads": 1},
        mesh=mesh,
        report={"evaluate_tokens": 256 * 8},
    )


@dataclass(frozen=True)
class Ran:
    """peak_bytes: the largest resident set of a worker as it trained; step_s: the median of steps
    after the first ones; whole_s: of all, without the reading of the text."""

    peak_bytes: int
    step_s: float
    whole_s: float


def ran(job: Job) -> Ran:
    """The job from its first step to its last, on workers of this machine."""
    folder = RunFolder(job.path)
    begin(job, folder, console_of_nobody())
    peak = 0

    def watch() -> None:
        nonlocal peak
        status = folder.status()
        if status.phase == "training" and status.step < job.steps - 1:
            peak = max(peak, *(_peak_bytes(child.pid) for child in psutil.Process().children()))

    begun_s = time.monotonic()
    with folder.locked():  # else its status says that nobody runs it
        launch(job, folder, watch)
    assert peak, "nobody looked while it trained"
    whole_s = time.monotonic() - begun_s
    steps = [line["step_s"] for line in folder.read_metrics() if "loss" in line]
    return Ran(peak, statistics.median(steps[WARM_UP:]), whole_s)


def _peak_bytes(pid: int) -> int:
    """The kernel's high-water mark of a process, 0 where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    marks = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
    return marks[0] if marks else 0
