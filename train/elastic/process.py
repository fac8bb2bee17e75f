"""Workers as plain processes of this machine: for one machine without Ray, and for most tests.

A server process has imported torch once and forks each worker, so a replacement starts in a moment.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from train.elastic.channel import Channel, connect
from train.elastic.keeper import Keeper
from train.elastic.messages import Beat, Hello
from train.elastic.trainee import StepEnd
from train.elastic.worker import ElasticWorker
from train.signals import starting_workers
from train.world import World

WORKER = "train.elastic.worker"


class Part(NamedTuple):
    """A worker's part of a job, as its process builds it; see `ElasticWorker`."""

    keeper: Keeper
    steps: int
    on_step: Callable[[int, StepEnd], None] = lambda generation, end: None
    ended: Callable[[], bool] = lambda: False
    finish: Callable[[World], None] = lambda world: None


Build = Callable[[str], Part]
"""Builds the part of the worker that it is told the name of; a module-level function, or a partial
of one: it is pickled."""


def work(
    build: Build, name: str, machine: str, address: tuple[str, int], key: bytes, threads: int
) -> None:
    """A worker's whole life; in its own process. threads: for computing, 0 for torch's default."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    channel = connect(address, key)
    channel.send(Hello(worker=name, pid=os.getpid(), machine=machine))
    with _beating(channel):  # a model may take minutes to load
        part = build(name)
    ElasticWorker(
        name,
        part.keeper,
        channel,
        part.steps,
        on_step=part.on_step,
        ended=part.ended,
        finish=part.finish,
    ).run()


@contextlib.contextmanager
def _beating(channel: Channel) -> Iterator[None]:
    """Signs of life while the worker does not listen yet."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(1.0):
            channel.send(Beat())

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class ProcessLauncher:
    """Starts workers as children of a fork server. preload: modules it imports beforehand."""

    def __init__(
        self,
        build: Build,
        *,
        threads: int = 1,
        preload: tuple[str, ...] = (WORKER,),
    ) -> None:
        self._build, self._threads = build, threads
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*preload])
        resource_tracker.ensure_running()  # first: where it starts, it lets SIGTERM through again
        with starting_workers():
            forkserver.ensure_running()
        self._processes: dict[str, BaseProcess] = {}

    def start(self, name: str, machine: str, address: tuple[str, int], key: bytes) -> None:
        """See `Launcher`."""
        arguments = (self._build, name, machine, address, key, self._threads)
        process = self._context.Process(target=work, args=arguments, name=name, daemon=True)
        process.start()
        self._processes[name] = process

    def pid(self, name: str) -> int | None:
        """Of a worker that was started here."""
        process = self._processes.get(name)
        return process.pid if process else None

    def kill(self, name: str) -> None:
        """See `Launcher`."""
        process = self._processes.pop(name, None)
        if process and process.pid:
            # Gone already, perhaps in this moment; not reaped yet, so the number is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def ending(self, name: str) -> str:
        """See `Launcher`."""
        process = self._processes.get(name)
        alive = process is not None and process.is_alive()
        return "" if alive else f"exit status {process.exitcode if process else 'unknown'}"

    def notices(self) -> dict[str, float]:
        """This machine stays."""
        return {}

    def close(self) -> None:
        """See `Launcher`."""
        for name in list(self._processes):
            self.kill(name)
