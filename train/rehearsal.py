"""A few real steps of a job, on workers started as the run will start them, to say what it takes:
`python -m train.rehearsal FOLDER RANK SIZE RENDEZVOUS THREADS PARENT` is one; `rehearse` has all.

What is timed is the run's own step, with its dtype, workers, threads, sums over workers and update;
one checkpoint; and a part of an evaluation. Memory is what the kernel has seen of each worker while
it made these steps. The text is made up, and nothing of it stays.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train.data.corpus import prepare
from train.folder import RunFolder, write
from train.job import Job
from train.local import launch
from train.run import Run
from train.weights import Start
from train.worker import leave, work
from train.world import World

WARM_UP = 2
"""Steps that are not timed: they allocate."""
LEAST, MOST, PATIENCE_S = 3, 30, 4.0
"""Steps that are timed, and for how long more than the fewest are."""
ROWS = 4
"""Held-out sequences for each worker of the evaluation that is timed."""
FILE = "rehearsal.json"


@dataclass(frozen=True)
class Rehearsal:
    """Seconds: of a step (the mean), of a checkpoint while all wait, of evaluating a held-out
    sequence on all workers together, and of starting and ending the workers. peak_bytes: the
    largest resident set of a worker, Python and torch included, up to the end of `steps` steps."""

    step_s: float
    checkpoint_s: float
    row_s: float
    start_s: float
    peak_bytes: int
    steps: int


def rehearse(job: Job, start: Start, watch: Callable[[], None] = lambda: None) -> Rehearsal:
    """Starts the job's workers on this machine for it. WorkerFailed as `launch` has it; ValueError
    where the job cannot be trained."""
    with tempfile.TemporaryDirectory(prefix="sanderling-rehearsal-") as scratch:
        folder = RunFolder(Path(scratch) / job.name)
        folder.write_job(_of_scratch(job, Path(scratch)))
        _made_up(job, start, folder.corpus)
        began_s = time.monotonic()
        launch(job, folder, watch, "train.rehearsal")
        whole_s = time.monotonic() - began_s
        told = json.loads((folder.path / FILE).read_text())
    took_s = told.pop("took_s")
    return Rehearsal(**told, start_s=max(whole_s - took_s, 0.0))


def _of_scratch(job: Job, scratch: Path) -> Job:
    rows = ROWS * job.workers.count
    report = job.report.model_copy(
        update={"evaluate_tokens": rows * job.data.sequence_tokens, "tensorboard": False}
    )
    resilience = job.resilience.model_copy(update={"checkpoints": ""})
    return job.model_copy(update={"folder": scratch, "report": report, "resilience": resilience})


def _made_up(job: Job, start: Start, corpus: Path) -> None:
    """As many random tokens as the timed steps and the evaluation read."""
    rows = ROWS * job.workers.count * job.data.sequence_tokens + 1
    steps = (WARM_UP + MOST) * job.run.batch_tokens + 1
    chance = np.random.default_rng(0)
    lengths = iter((min(steps, 1 << 22), rows))

    def encode(_text: str) -> list[int]:
        return list(map(int, chance.integers(0, start.config.vocab, next(lengths))))

    prepare(corpus, ("train", "held out"), encode, start.end_id, 2)


def measured(run: Run, world: World) -> str:
    """In a worker: times what is to be known; rank 0 writes it down."""
    began_s = time.monotonic()
    for _ in range(WARM_UP):
        run.trainer.step(world)
    steps, timed_s = 0, time.monotonic()
    stop = False
    while not stop:
        steps += 1
        over = time.monotonic() - timed_s > PATIENCE_S
        # Rank 0's clock: its wish comes with the step's own sum, so all end after the same one.
        wish = world.rank == 0 and (steps >= MOST or (steps >= LEAST and over))
        stop = run.trainer.step(world, wish).stop
    step_s = (time.monotonic() - timed_s) / steps
    peak = torch.tensor([high_water_bytes()])
    peak_bytes = max(int(found) for found in world.all_gather(peak))
    checkpoint_s = _seconds(lambda: run.save_now(world))
    row_s = _seconds(lambda: run.evaluate(world)) / (ROWS * world.size)
    if world.rank == 0:
        took_s = time.monotonic() - began_s
        told = {"step_s": step_s, "checkpoint_s": checkpoint_s, "row_s": row_s, "took_s": took_s}
        told |= {"peak_bytes": peak_bytes, "steps": WARM_UP + steps}
        write(run.folder.path / FILE, json.dumps(told))
    return f"rehearsed {steps} steps"


def high_water_bytes() -> int:
    """The largest resident set that this process has had (Linux's VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (mark,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(mark) << 10


def _seconds(act: Callable[[], object]) -> float:
    started_s = time.monotonic()
    act()
    return time.monotonic() - started_s


if __name__ == "__main__":
    leave(work(sys.argv[1:], measured))
