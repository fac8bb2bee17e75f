"""A job of `sanderling train` whose machines come and go by somebody else's word (`sanderling
share`): begun, run in a thread of its own, and stopped with a checkpoint."""

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from rich.console import Console

from train.commands import begin, refuse_changes
from train.elastic.job import PRELOAD, log_to, part, policy_of
from train.elastic.membership import JobFailed
from train.elastic.process import ProcessLauncher
from train.elastic.supervisor import Supervisor
from train.elastic.yielding import Claim, Yielding
from train.folder import RunFolder
from train.job import read_job
from train.local import threads_of
from train.view import line

GUESS_S = 5.0
"""How long a change is reckoned to stop a job on one machine, until one was measured."""


class SharedJob:
    """The job in a TOML file. Entered, it has its folder to itself; left, it has been stopped.

    name, wanted: machines that it can use. usd_per_machine_h: what one costs, and is worth to it.
    ValueError if the job's workers cannot come and go.
    """

    def __init__(self, path: Path) -> None:
        self.job = read_job(path)
        if self.job.workers.where != "elastic":
            raise ValueError(
                f"workers.where = {self.job.workers.where!r} in {path}: a job that shares its "
                'machines has workers that come and go; workers.where = "elastic" is accepted'
            )
        self.name, self.wanted = self.job.name, self.job.workers.count
        self.usd_per_machine_h = self.job.budget.usd_per_worker_h
        self.folder = RunFolder(self.job.path)
        self.failure = ""
        self._policy = policy_of(self.job)
        self._held = ExitStack()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        """Lays the run's folder, or finds it as it was left."""
        self._held.enter_context(self.folder.locked())
        if self.folder.begun:
            refuse_changes(self.folder.job(), self.job)
        begin(self.job, self.folder, Console())
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.ask_to_stop()
            self._thread.join()
        self._held.close()

    def start(self, machines: tuple[str, ...]) -> None:
        """Trains on these machines, from the newest checkpoint on. Returns at once."""
        threads = threads_of(self.job)
        build = partial(part, self.folder.path.resolve(), threads)
        launcher = ProcessLauncher(build, threads=threads, preload=PRELOAD)
        self.folder.log.mkdir(parents=True, exist_ok=True)
        self._supervisor = Supervisor(self._policy, launcher, machines=machines)
        self._supervisor.on_event = partial(log_to, self.folder.log / "events.jsonl")
        self._yielding = Yielding(
            self.name,
            self._supervisor,
            wanted=self.wanted,
            machine_usd_per_h=self.usd_per_machine_h,
            value_usd_per_h=self.usd_per_machine_h,
            guess_s=GUESS_S,
        )
        self._thread.start()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except JobFailed as failure:
            self.failure = str(failure)

    @property
    def over(self) -> bool:
        """Whether it has ended; `failure` says why, if that was not as it should be."""
        return self._supervisor.over

    def ask_to_stop(self) -> None:
        """Has it end after the step under way, with a checkpoint."""
        self.folder.ask_to_stop()

    def said(self) -> str:
        """Where it is, in one line."""
        status = self.folder.status()
        return f"{status.phase}: {line(status)}" if not self.failure else self.failure

    def claim(self) -> Claim:
        """See Yielding."""
        return self._yielding.claim()

    def give(self, machine: str, notice_s: float) -> None:
        """See Yielding."""
        self._yielding.give(machine, notice_s)

    def take(self, machine: str) -> None:
        """See Yielding."""
        self._yielding.take(machine)
