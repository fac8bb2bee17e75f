"""A worker that may not have more memory than it is told: python -m tests.train.memory.capped SPEC.

SPEC is JSON: `job` (a job), `corpus` (folder), `folder` (of the files), `steps`, and `cap_bytes`,
the most private memory (RLIMIT_DATA: heap, stacks and private mappings; files that are mapped or
cached are not private) that the process may have in all, or `beyond_bytes`, how much more than it
has when it has warmed up; neither: no cap. Prints JSON: losses, bytes of /proc/self/io by
step, and the tier's own counts. What runs out of memory ends with status 1.
"""

import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from train.data.corpus import open_corpus
from train.data.stream import SampleStream, Tokens
from train.folder import RunFolder
from train.job import Job
from train.memory.disk import DiskTrainer
from train.memory.offload import OffloadTrainer
from train.memory.trainers import build_trainer
from train.step import Trainer
from train.tables import MemoryTable
from train.weights import build_model, read_start
from train.world import LocalWorld

ROOT = Path(__file__).parents[3]
STACK_BYTES = 1 << 20


def private_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def disk_bytes() -> tuple[int, int]:
    """Read from and written to storage by this process, as the kernel counts them."""
    text = Path("/proc/self/io").read_text()
    counts = dict(re.findall(r"(\w+): (\d+)", text))
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains; what is printed."""
    torch.set_num_threads(1)
    threading.stack_size(STACK_BYTES)
    job, corpus = Job.model_validate(spec["job"]), open_corpus(Path(spec["corpus"])).train
    _warm_up(job, corpus)
    before = private_bytes()
    cap = spec.get("cap_bytes") or spec.get("beyond_bytes", 0) and before + spec["beyond_bytes"]
    if cap:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    start = read_start(job)
    stream = SampleStream(corpus, job.data.sequence_tokens, job.run.seed)
    trainer, _ = build_trainer(job, RunFolder(Path(spec["folder"])), start, stream)
    gc.collect()
    losses, moved, counted = [], [], []
    for _ in range(spec["steps"]):
        io = disk_bytes()
        tier = trainer.tier if isinstance(trainer, DiskTrainer) else None
        own = (tier.read_bytes, tier.written_bytes) if tier else (0, 0)
        losses.append(trainer.step(LocalWorld()).loss)
        if tier:
            tier.settle()
            counted.append([tier.read_bytes - own[0], tier.written_bytes - own[1]])
        after = disk_bytes()
        moved.append([after[0] - io[0], after[1] - io[1]])
    return {
        "losses": losses,
        "moved": moved,
        "counted": counted,
        "direct": tier.direct if tier else None,
        "device_peak_bytes": trainer.arena.peak_bytes
        if isinstance(trainer, OffloadTrainer)
        else None,
        "private_bytes": [before, private_bytes()],
        "cap_bytes": cap,
    }


def _warm_up(job: Job, corpus: Tokens) -> None:
    """Has libraries allocate what they keep (matrix kernels, autograd's thread), by a step of one
    layer in the job's dtype; what the step itself took goes back to the system."""
    model = job.model.model_copy(update={"layers": 1})
    small = job.model_copy(update={"model": model, "memory": MemoryTable()})
    stream = SampleStream(corpus, job.data.sequence_tokens, 0)
    Trainer(small, build_model(small, read_start(small)), stream).step(LocalWorld())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run(timeout_s: float = 280, **spec: Any) -> subprocess.CompletedProcess[str]:
    """This module in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.train.memory.capped", json.dumps(spec)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
