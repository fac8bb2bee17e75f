"""A job of `sanderling train` on workers that come and go: a `Run` made one step at a time, and the
launchers that put it under a supervisor (`workers.where`: this machine's processes, or Ray).

Each worker resumes from the newest checkpoint when it starts, so what all of them together lose is
no more than the steps since. While one of them lives, no checkpoint is read into the run.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from train.checkpoints import Checkpoints, open_checkpoints
from train.elastic.keeper import Replicas
from train.elastic.membership import JobFailed, Policy
from train.elastic.process import Part, ProcessLauncher
from train.elastic.ray_workers import RayLauncher
from train.elastic.supervisor import Journal, Launcher, Supervisor
from train.folder import RunFolder
from train.job import Job
from train.journal import configure_torch
from train.local import WorkerFailed, threads_of
from train.run import Run
from train.state import TrainState
from train.step import StepReport
from train.world import World

PRELOAD = ("train.elastic.worker", "train.run")
WAIT_S = 60.0
"""How long survivors wait for a replacement that starts: longer than one takes, so that a run whose
machines are there keeps its size, and with it its bits."""


class ElasticRun(Run):
    """A job on one worker, a step at a time: a `Trainee` whose state has the run's own facts."""

    def __init__(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> None:
        super().__init__(job, folder, checkpoints)
        self._generation = -1
        self.stopped = False

    def load(self, state: TrainState) -> None:
        """The trainer's, and what the run has spent."""
        self.trainer.load(state)
        self.last = state.meta.get("last", {})
        self._spent = (state.meta.get("trained_s", 0.0), state.meta.get("usd", 0.0))
        status = self.journal.status
        self.journal.status = replace(status, trained_s=self._spent[0], usd=self._spent[1])

    def step(self, world: World, stop: bool = False) -> StepReport:
        """One step with all that follows it (journal, checkpoint, evaluation). Rank 0 also asks for
        an end where a person or the budget does; then `stopped` is true everywhere after it."""
        first = world.rank == 0
        if first and world.generation != self._generation:
            status = self.journal.status
            spent = (status.trained_s, status.usd) if self._generation >= 0 else self._spent
            self.journal.begin(self.trainer.step_number, *spent, world)
            self._note_what_is_missing()
        self._generation = world.generation
        over = first and (self.folder.stop_asked or bool(self.journal.over_budget()))
        report = self.trainer.step(world, stop or over)
        self._after(report, world)
        if report.stop:
            ending = torch.tensor([float(over)])
            world.broadcast(ending, 0)
            self.stopped = bool(ending)
        return report

    def _note_what_is_missing(self) -> None:
        """Who noted the steps may have been lost between the last one and its line."""
        lines = self.folder.read_metrics()
        noted = max((line["step"] for line in lines if "loss" in line), default=0)
        if self.last and noted < self.last["step"] == self.trainer.step_number:
            self.journal.note(StepReport(**self.last, stop=False, ids=[]))  # type: ignore[arg-type]

    def ended(self) -> bool:
        """Whether no step is to follow."""
        return self.stopped or self.trainer.step_number >= self.job.steps

    def finish(self, world: World) -> None:
        """The last checkpoint, the evaluation and the exported model."""
        self._end(world)


def part(path: Path, threads: int, name: str) -> Part:
    """A worker's part of the job in a run's folder; in the worker's process."""
    folder = RunFolder(path)
    job = folder.job()
    configure_torch(threads, job.run.deterministic)
    run = ElasticRun(job, folder, open_checkpoints(job, folder.checkpoints))
    run.resume()
    return Part(Replicas(run), job.steps, ended=run.ended, finish=run.finish)


def launch(job: Job, folder: RunFolder, watch: Callable[[], None]) -> None:
    """As `train.local.launch`, but a worker that dies is replaced and the others stay."""
    threads = threads_of(job)
    launcher = ProcessLauncher(
        partial(part, folder.path.resolve(), threads), threads=threads, preload=PRELOAD
    )
    supervise(job, folder, launcher, watch)


def launch_on_ray(job: Job, folder: RunFolder, watch: Callable[[], None]) -> None:
    """As `launch`, with actors of the Ray cluster that this process runs in; every
    node must see the run's folder. ValueError if there is no cluster."""
    import ray

    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(
                f'workers.where = "ray" needs a Ray cluster: start it by `ray job submit`, '
                f'or give workers.where = "elastic" for processes of this machine ({error})'
            ) from error
    build = partial(part, folder.path.resolve(), threads_of(job))
    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    supervise(job, folder, RayLauncher(build, threads=threads_of(job)), watch, host)


def supervise(
    job: Job,
    folder: RunFolder,
    launcher: Launcher,
    watch: Callable[[], None],
    host: str = "127.0.0.1",
) -> None:
    """Runs the job to its end; the supervisor's log is events.jsonl in the run's log folder."""
    folder.log.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(policy_of(job), launcher, host=host)
    supervisor.on_event = partial(log_to, folder.log / "events.jsonl")
    failures: list[JobFailed] = []

    def run() -> None:
        try:
            supervisor.run()
        except JobFailed as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="supervisor")
    thread.start()
    while thread.is_alive():
        watch()
        thread.join(0.1)
    if failures:
        raise WorkerFailed(str(failures[0]), by_user="ValueError" in str(failures[0]))


def policy_of(job: Job) -> Policy:
    """ValueError when the job wants more than it has at the least."""
    return Policy(job.workers.count, least=job.workers.least, wait_s=WAIT_S)


def log_to(path: Path, entry: Journal) -> None:
    """One line for each event but steps, which the run's own journal has."""
    what = entry.what if isinstance(entry.what, str) else entry.what.model_dump_json()
    if '"kind":"finished"' not in what:
        with path.open("a", encoding="utf-8") as file:
            file.write(f'{{"at_s": {time.time():.3f}, "worker": "{entry.worker}", "event": ')
            file.write(f"{what if what[:1] == '{' else chr(34) + what + chr(34)}}}\n")
