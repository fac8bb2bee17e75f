"""The command `train` and what belongs to it: run a job, look at it, stop it, go on.

Imported by the CLI when it is called; torch only where something is computed.
"""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from cluster.registry import Registry
from train.folder import ENDED, RunFolder, Status
from train.job import Job, checked, read_job
from train.view import Progress, estimate_table, line, status_table
from train.view import plot as draw_losses

PATH = click.Path(path_type=Path)
STOP_S = 300.0
PASSING = "working_dir_files"
"""The folder below which Ray unpacks the working directories of jobs."""
Launcher = Callable[[Job, RunFolder, Callable[[], None]], None]

LAUNCHERS = Registry(
    "launcher (workers.where)",
    {
        "local": "train.local:launch",
        "elastic": "train.elastic.job:launch",
        "ray": "train.elastic.job:launch_on_ray",
    },
)
"""Who runs a job's workers to their end."""

CURVE = ("model", "data", "run", "optimizer", "schedule", "compression", "communication")
"""Tables that a run cannot change on the way; of `run`, how much is computed at once may."""


class JobGroup(click.Group):
    """A group whose first argument may also be a job's file: `train job.toml` is `train run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options of `run` may come before the file, too."""
        if args and args[0].startswith("--") and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=JobGroup)
def train() -> None:
    """Train a model: `sanderling train job.toml`, again to go on where it ended."""


@train.command()
@click.argument("job", type=PATH)
@click.option("--dry-run", is_flag=True, help="Say what it will take, and end.")
@click.option("--advise", is_flag=True, help="Rank the forms it can take, and end.")
@click.option("--devices", default="", help="Advise for these: '2xa10g@1.01,4xt4', 'here*0.4'.")
@click.option("--network", type=click.FloatRange(min=1e-6), help="GB/s between machines (advise).")
@click.option("--plot", type=PATH, help="Draw the advice into this PNG.")
@click.option("--fresh", is_flag=True, help="Start over: forget the run of this name.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Instead of workers.count.")
def run(
    job: Path,
    dry_run: bool,
    advise: bool,
    devices: str,
    network: float | None,
    plot: Path | None,
    fresh: bool,
    workers: int | None,
) -> None:
    """Run the job in a TOML file, or go on with it."""
    wanted = _with_workers(read_job(job), workers)
    console = Console()
    if advise:
        from train.advise.command import show

        show(wanted, console, devices, network, plot)
        return
    if devices or network or plot:
        raise ValueError("--devices, --network and --plot are read with --advise")
    if dry_run:
        from train.estimate import estimate
        from train.journal import configure_torch
        from train.local import WorkerFailed, threads_of

        launcher_of(wanted)
        configure_torch(threads_of(wanted), wanted.run.deterministic)
        try:
            found = estimate(wanted)
        except WorkerFailed as error:
            click.echo(f"sanderling: {error}", err=True)
            sys.exit(2 if error.by_user else 1)
        console.print(estimate_table(wanted, found))
        console.print(found.how, highlight=False)
        return
    folder = RunFolder(wanted.path)
    with folder.locked():
        if fresh:
            forget(folder)
        elif folder.begun:
            refuse_changes(folder.job(), wanted)
        begin(wanted, folder, console)
        sys.exit(carry_on(wanted, folder, console))


@train.command()
@click.argument("run", type=PATH)
def status(run: Path) -> None:
    """Where a run is. RUN is its folder, or its job's file."""
    folder = _find(run)
    folder.job()
    Console().print(status_table(folder))


@train.command()
@click.argument("run", type=PATH)
def stop(run: Path) -> None:
    """End a run after its step under way, with a checkpoint, and wait until it has."""
    folder = _find(run)
    folder.job()
    if not folder.is_running():
        click.echo(f"{folder.path} does not run.")
        return
    folder.ask_to_stop()
    deadline_s = time.monotonic() + STOP_S
    while folder.is_running():
        if time.monotonic() > deadline_s:
            click.echo(f"{folder.path} still runs after {STOP_S:.0f} s.", err=True)
            sys.exit(1)
        time.sleep(0.1)
    click.echo(line(folder.status()))


@train.command()
@click.argument("run", type=PATH)
@click.option("--workers", type=click.IntRange(1, 1024), help="Instead of as many as before.")
def resume(run: Path, workers: int | None) -> None:
    """Go on with a run from its newest checkpoint, by its folder alone."""
    folder = _find(run)
    wanted = _with_workers(folder.job(), workers)
    console = Console()
    with folder.locked():
        begin(wanted, folder, console)
        sys.exit(carry_on(wanted, folder, console))


def begin(job: Job, folder: RunFolder, console: Console) -> None:
    """Lays the run's folder: its job, and the corpus where it is not there yet."""
    launcher_of(job)  # refused here, before anything is computed
    refuse_passing(folder.path)
    folder.write_job(job)
    folder.clear_stop()
    folder.write_status(Status("starting", steps=job.steps))
    if not (folder.corpus / "corpus.json").is_file():
        from train.data.corpus import prepare
        from train.data.texts import documents
        from train.weights import read_start

        console.print(f"Reading {', '.join(job.data.sources)} ...")
        start = read_start(job)
        texts = documents(job.data.sources)
        corpus = prepare(folder.corpus, texts, start.encode, start.end_id, job.data.held_out_every)
        found = f"{len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out"
        console.print(found, highlight=False, soft_wrap=True)


def refuse_passing(path: Path) -> None:
    """ValueError for a run in the working directory of a Ray job, which goes with the job."""
    if PASSING in path.resolve().parts:
        raise ValueError(
            f"{path} is in the working directory of this Ray job, which Ray deletes when the job "
            "ends: give the job's file a folder = that every node sees and that stays."
        )


def carry_on(job: Job, folder: RunFolder, console: Console) -> int:
    """Runs the workers to the end, showing where they are; the exit status."""
    from train.local import WorkerFailed

    launch = launcher_of(job)
    try:
        with Progress(folder, console) as progress, _signals_stop(folder):
            launch(job, folder, lambda: progress.update(time.monotonic()))
    except WorkerFailed as error:
        click.echo(f"sanderling: {error}", err=True)
        return 2 if error.by_user else 1
    found = folder.status()
    console.print(f"{found.phase}: {line(found)}", highlight=False, soft_wrap=True)
    if draw_losses(folder, folder.plot):
        console.print(f"The loss is drawn in {folder.plot}", highlight=False, soft_wrap=True)
    else:
        console.print("The loss is not drawn: pip install sanderling[plot]", markup=False)
    if found.phase == "finished":
        console.print(
            f"Mixtral's format, for whoever reads that: {folder.path}"
            if job.model.experts
            else f"Serve it: sanderling up --model {folder.path}",
            highlight=False,
            soft_wrap=True,
        )
    elif found.phase in ENDED:
        console.print(
            f"Go on: sanderling train resume {folder.path}", highlight=False, soft_wrap=True
        )
    return 0


@contextmanager
def _signals_stop(folder: RunFolder) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop, the second ends it at once."""

    def handle(_signal: int, _frame: object) -> None:
        if folder.stop_asked:
            raise KeyboardInterrupt
        folder.ask_to_stop()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def launcher_of(job: Job) -> Launcher:
    """Who runs the job's workers. ValueError lists the known ones."""
    launcher: Launcher = LAUNCHERS.load(job.workers.where)
    return launcher


def refuse_changes(old: Job, new: Job) -> None:
    """ValueError when a run cannot go on as the job says now, since its curve would be another."""
    for table in CURVE:
        before, after = getattr(old, table), getattr(new, table)
        for name in type(before).model_fields:
            free = (table, name) == ("run", "micro_batch_tokens")
            was, now = getattr(before, name), getattr(after, name)
            if was != now and not free:
                raise ValueError(
                    f"{table}.{name} was {was!r} when {old.path} began and is {now!r} now: give "
                    "the run another name, or --fresh to start over."
                )
    if old.precision != new.precision:
        raise ValueError(f"precision.compute cannot change in {old.path}; --fresh starts over.")


def forget(folder: RunFolder) -> None:
    """Removes what a run has left, its corpus too."""
    if folder.begun:
        from train.checkpoints import open_checkpoints

        open_checkpoints(folder.job(), folder.checkpoints).clear()
    for path in (folder.corpus, folder.log, folder.board):
        shutil.rmtree(path, ignore_errors=True)
    folder.metrics.unlink(missing_ok=True)
    (folder.path / "status.json").unlink(missing_ok=True)


def _with_workers(job: Job, workers: int | None) -> Job:
    if workers is None:
        return job
    table = job.workers.model_copy(update={"count": workers})
    return checked(job.model_copy(update={"workers": table}))


def _find(run: Path) -> RunFolder:
    return RunFolder(read_job(run).path if run.is_file() else run)
