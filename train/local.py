"""Workers as processes of this machine, over gloo on the loopback interface.

One that fails ends all: the run then goes on from its newest checkpoint when it is started again.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from train.folder import RunFolder
from train.job import Job
from train.signals import starting_workers

POLL_S = 0.1
GRACE_S = 60.0
"""How long the others may take to end once one has."""


class WorkerFailed(Exception):
    """A worker ended badly; the message holds the end of its log. by_user: it is a sentence."""

    def __init__(self, message: str, by_user: bool) -> None:
        super().__init__(message)
        self.by_user = by_user


def threads_of(job: Job) -> int:
    """Threads of each worker."""
    cores = len(os.sched_getaffinity(0))
    return job.workers.threads or max(1, cores // job.workers.count)


def launch(
    job: Job, folder: RunFolder, watch: Callable[[], None], module: str = "train.worker"
) -> None:
    """Runs the job's workers to their end; `watch` is called every POLL_S. WorkerFailed when one
    fails; on any error (and Ctrl-C) no process stays behind. module: what each of them runs."""
    folder.log.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sanderling-train-") as meeting:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(job.workers.count):
                log = _log(folder, rank)
                with log.open("wb") as file:
                    store = Path(meeting) / "store"
                    processes.append(_start(job, folder, rank, store, file, module))
            _wait(processes, folder, watch)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _log(folder: RunFolder, rank: int) -> Path:
    return folder.log / f"worker-{rank}.log"


def _start(
    job: Job, folder: RunFolder, rank: int, store: Path, log: IO[bytes], module: str
) -> subprocess.Popen[bytes]:
    threads, size = threads_of(job), job.workers.count
    root = str(Path(__file__).resolve().parents[1])
    rest = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{rest}" if rest else root,
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    numbers = [str(rank), str(size), str(store), str(threads), str(os.getpid())]
    with starting_workers():
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder.path), *numbers],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the command's, which asks them to stop
        )


def _wait(
    processes: list[subprocess.Popen[bytes]], folder: RunFolder, watch: Callable[[], None]
) -> None:
    deadline_s = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            raise _failure(folder, failed)
        if all(code == 0 for code in codes):
            return
        if any(code == 0 for code in codes):
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline_s:
            raise WorkerFailed("a worker did not end with the others", by_user=False)
        watch()
        time.sleep(POLL_S)


def _failure(folder: RunFolder, failed: list[tuple[int, int]]) -> WorkerFailed:
    """About the rank whose own log says most: one with a sentence, or the first that ended."""
    rank, code = min(failed, key=lambda found: (found[1] != 2, found[1] > 0, found[0]))
    lines = _log(folder, rank).read_text(errors="replace").strip().splitlines()
    if code == 2:
        return WorkerFailed(lines[-1] if lines else "a worker refused the job", by_user=True)
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    tail = "\n".join(lines[-12:])
    return WorkerFailed(
        f"worker {rank} {ended}; start the run again to go on from its newest checkpoint. The end "
        f"of {_log(folder, rank)}:\n{tail}",
        by_user=False,
    )
