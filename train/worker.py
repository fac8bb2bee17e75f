"""A worker process on this machine:
python -m train.worker FOLDER RANK SIZE RENDEZVOUS THREADS PARENT.

Started by `train.local`, which it outlives by at most one step.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed import FileStore  # type: ignore[attr-defined]

from train.checkpoints import open_checkpoints
from train.folder import RunFolder
from train.journal import configure_torch
from train.run import Run
from train.world import GlooWorld, LocalWorld, World, join

USER_ERROR = 2
"""Exit status when the last line of the log is a sentence for the user."""


def work(arguments: list[str], act: Callable[[Run, World], str]) -> int:
    """Takes its place among the workers and does `act`, whose result is printed with the step it
    came to; the exit status."""
    path, rank, size, rendezvous, threads, parent = arguments
    _end_with(int(parent))
    folder = RunFolder(Path(path))
    job = folder.job()
    configure_torch(int(threads), job.run.deterministic)
    world: World = LocalWorld()
    if int(size) > 1:
        world = join(FileStore(rendezvous, int(size)), int(rank), int(size))
    try:
        run = Run(job, folder, open_checkpoints(job, folder.checkpoints))
        run.resume(world)
        ending = act(run, world)
    except ValueError as error:
        print(error, flush=True)
        return USER_ERROR
    if isinstance(world, GlooWorld):
        world.close()
    print(f"rank {rank}: {ending} at step {run.trainer.step_number}", flush=True)
    return 0


def leave(status: int) -> None:
    """Ends the process once all is written, without taking libraries apart: at a usual exit a
    thread of gloo's that is not done yet now and then aborts a worker whose work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with(parent: int) -> None:
    """Has the kernel end this process when its parent ends (Linux's PR_SET_PDEATHSIG); at once, if
    the parent is gone already."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    leave(work(sys.argv[1:], lambda run, world: run.run(world)))
