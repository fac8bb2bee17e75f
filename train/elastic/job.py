"""Jobs of `sanderling train` on workers that come and go: what a worker builds, and the launchers
that put it under a supervisor (`workers.where`: this machine's processes, or Ray)."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from train.checkpoints import open_checkpoints
from train.elastic.keeper import Keeper, Replicas
from train.elastic.membership import JobFailed, Policy
from train.elastic.peers import PeerMemory
from train.elastic.process import Part, ProcessLauncher
from train.elastic.ray_workers import RayLauncher
from train.elastic.run import ElasticRun
from train.elastic.supervisor import Journal, Launcher, Supervisor
from train.folder import RunFolder
from train.job import Job
from train.journal import configure_torch
from train.local import WorkerFailed, threads_of
from train.signals import own_stop

PRELOAD = ("train.elastic.worker", "train.run")
WAIT_S = 60.0
"""How long survivors wait for a replacement that starts: longer than one takes, so that a run whose
machines are there keeps its size, and with it its bits."""


SHRINKING = ("bamboo", "oobleck")
"""Modes whose survivors go on without whoever was lost, until the run is started again."""


def part(path: Path, threads: int, name: str) -> Part:
    """A worker's part of the job in a run's folder; in the worker's process."""
    folder = RunFolder(path)
    job = folder.job()
    configure_torch(threads, job.run.deterministic)
    run = ElasticRun(job, folder, open_checkpoints(job, folder.checkpoints))
    return Part(_keeper(run), job.steps, ended=run.ended, finish=run.finish)


def _keeper(run: ElasticRun) -> Keeper:
    """How the job's resilience mode keeps the state among workers."""
    if run.job.pipeline.stages:
        from train.elastic.stages import PipelineKeeper

        return PipelineKeeper(run)
    if run.job.resilience.mode == "gemini":
        from train.elastic.shares import SharedRun, StoredShares

        trainee = SharedRun(run)
        return PeerMemory(trainee, run.job.resilience.copies, StoredShares(trainee))
    run.resume()
    return Replicas(run)


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
            with own_stop():
                ray.init("auto", log_to_driver=False)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
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
    mode = job.resilience.mode
    wait_s = 0.0 if mode == "varuna" else WAIT_S  # it has a form for whoever is there
    count, least = job.workers.count, job.workers.least
    return Policy(count, least=least, wait_s=wait_s, replaced=mode not in SHRINKING)


def log_to(path: Path, entry: Journal) -> None:
    """One line for each event but steps, which the run's own journal has."""
    what = entry.what if isinstance(entry.what, str) else entry.what.model_dump_json()
    if '"kind":"finished"' not in what:
        with path.open("a", encoding="utf-8") as file:
            file.write(f'{{"at_s": {time.time():.3f}, "worker": "{entry.worker}", "event": ')
            file.write(f"{what if what[:1] == '{' else chr(34) + what + chr(34)}}}\n")
