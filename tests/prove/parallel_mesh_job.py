"""Proof rows of jobs with `[mesh]`, and of one with `[pipeline]`: what `--dry-run` says of memory
and time, against the job that then runs.

Memory is a worker's greatest resident set while it trains, above that of a worker of the same job
with a model of nothing; the checkpoint and the export at a run's end are not in it. Time is that of
a step and of the whole job, from starting its workers to the last file.

`python -m tests.prove.parallel_mesh_job FOLDER RANK SIZE RENDEZVOUS THREADS PARENT` is a worker
whose allocator gives each tensor's memory back: it has no holes, and grows by tensors alone.
"""

import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from models.config import ModelConfig
from tests.prove.row import Row
from tests.train import tiny
from train import journal
from train.commands import begin
from train.estimate import Estimate, estimate
from train.folder import RunFolder
from train.job import Job
from train.local import launch
from train.parallel.mesh_cost import batch_of, shape_of
from train.parallel.mesh_moments import peak_bytes
from train.view import console_of_nobody
from train.weights import read_start
from train.worker import leave, work

WORKERS, STEPS, WARM_UP = 4, 8, 2
FORMS: dict[str, dict[str, Any]] = {
    "dp x tp + sp": {"mesh": {"tensor": 2, "sequence_parallel": True}},
    "fsdp x tp": {"mesh": {"tensor": 2, "full_shard": True}},
    "ring x dp": {"mesh": {"sequence": 2}},
    "ulysses x dp": {"mesh": {"sequence": 2, "sequence_kind": "ulysses"}},
    "ep x dp": {"mesh": {"expert": 2}, "model": {"experts": 4}},
    "dp x pp": {"pipeline": {"stages": 2}},
}
COUNTED = "ring x dp"
"""Whose formula is held against workers without holes."""
LARGE = {"layers": 6, "hidden": 448, "heads": 14, "kv_heads": 14, "feed_forward": 1216}
SMALL = {"layers": 2, "hidden": 56, "heads": 14, "kv_heads": 14, "feed_forward": 32}
MEMORY, TIME = 0.10, 0.25
M_MMAP_THRESHOLD, SMALLEST_BYTES = -3, 128 << 10
"""Of glibc's mallopt (malloc.h); from so many bytes on, memory is the kernel's own."""


def rows() -> Iterator[Row]:
    """Two for each form and two of the formula; about seven minutes."""
    torch.set_num_threads(1)
    for name, tables in FORMS.items():
        with tempfile.TemporaryDirectory() as scratch:
            yield from _of_form(name, tables, Path(scratch))


def _of_form(name: str, tables: dict[str, Any], scratch: Path) -> Iterator[Row]:
    job = _job(scratch, "large", tables, LARGE)
    # Its steps are short: enough of them that somebody looks meanwhile.
    idle = ran(_job(scratch, "small", tables, SMALL, 8 * STEPS)).peak_bytes
    told, found = estimate(job), ran(job)
    yield _memory(name, job, told, found.peak_bytes, idle)
    step, whole = told.step_s / found.step_s - 1, told.hours * 3600 / found.whole_s - 1
    yield Row(
        f"--dry-run, {name}: time of a step, of the job",
        f"within {TIME:.0%}",
        f"{step:+.1%} ({told.step_s:.2f} and {found.step_s:.2f} s), {whole:+.1%} "
        f"({told.hours * 3600:.0f} and {found.whole_s:.0f} s)",
        abs(step) <= TIME and abs(whole) <= TIME,
    )
    if name == COUNTED:
        few = _job(scratch, "unkept", tables, LARGE, STEPS // 2)
        none = _job(scratch, "unkept-small", tables, SMALL, 8 * STEPS)
        grew = ran(few, __name__).peak_bytes - ran(none, __name__).peak_bytes
        yield from _counted(name, job, grew)


def _memory(name: str, job: Job, told: Estimate, peak: int, idle: int) -> Row:
    """What was rehearsed; both above the same idle worker."""
    off = (told.peak_bytes - idle) / (peak - idle) - 1
    counted = ""
    if job.meshed:
        share = counted_bytes(job) / (peak - idle)
        counted = f"; tensors by the formula {counted_bytes(job) >> 20}, {share:.0%} of it"
    return Row(
        f"--dry-run, {name}: memory of a worker",
        f"within {MEMORY:.0%} of its growth",
        f"{off:+.1%} ({told.peak_bytes - idle >> 20} and {peak - idle >> 20} MiB above "
        f"{idle >> 20}{counted})",
        abs(off) <= MEMORY,
    )


def _counted(name: str, job: Job, grew: int) -> Iterator[Row]:
    """The formula against workers that keep no freed memory, and what it says when it does not know
    that sequences are shared, which must be too far off."""
    said = counted_bytes(job)
    yield Row(
        f"--dry-run, {name}: the formula, where an allocator keeps nothing that is freed",
        f"within {MEMORY:.0%} of a worker's growth",
        f"{said / grew - 1:+.1%} ({said >> 20} and {grew >> 20} MiB)",
        abs(said / grew - 1) <= MEMORY,
    )
    broken = counted_bytes(job, sequence=1)
    yield Row(
        f"--dry-run, {name}: a formula that does not share sequences",
        f"not within {MEMORY:.0%}",
        f"{broken / grew - 1:+.1%} ({broken >> 20} MiB)",
        abs(broken / grew - 1) > MEMORY,
    )


def counted_bytes(job: Job, **other: Any) -> int:
    """Of tensors; other: of a shape that differs from the job's."""
    config: ModelConfig = read_start(job).config
    shape = shape_of(job)
    batch = batch_of(job, shape)
    return peak_bytes(config, replace(shape, **other), batch, job.precision.compute)


def _job(
    scratch: Path, name: str, tables: dict[str, Any], model: dict[str, Any], steps: int = STEPS
) -> Job:
    texts = tiny.write_texts(scratch / "texts", 40)
    samples = 8
    return tiny.job(
        name=name,
        folder=scratch,
        model=model | {"tied_head": "pipeline" not in tables} | tables.get("model", {}),
        data={"sources": (str(texts),), "sequence_tokens": 256},
        run={
            "tokens": 256 * samples * steps,
            "batch_tokens": 256 * samples,
            "micro_batch_tokens": 256 * (2 if "pipeline" in tables else 4),
        },
        precision={"compute": "float32"},
        workers={"count": WORKERS, "threads": 1},
        report={"evaluate_tokens": 256 * 8},
        **{name: table for name, table in tables.items() if name != "model"},
    )


@dataclass(frozen=True)
class Ran:
    """peak_bytes: the largest resident set of a worker as it trained; step_s: the median of steps
    after the first ones; whole_s: of all, without the reading of the text."""

    peak_bytes: int
    step_s: float
    whole_s: float


def ran(job: Job, module: str = "train.worker") -> Ran:
    """The job from its first step to its last, on workers of this machine; module: what each is."""
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
        launch(job, folder, watch, module)
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


def keep_nothing() -> None:
    """Instead of `train.journal.keep_freed_memory`."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALLEST_BYTES)


if __name__ == "__main__":
    journal.keep_freed_memory = keep_nothing
    leave(work(sys.argv[1:], lambda run, world: run.run(world)))
