"""`sanderling train --advise job.toml`: what there is to choose, what each choice costs."""

from pathlib import Path

from rich.console import Console

from train.advise.machines import machines_of, with_workers
from train.advise.ranking import advise
from train.advise.view import draw, print_advice, refuse_without_library
from train.job import Job
from train.journal import configure_torch
from train.local import threads_of
from train.weights import read_start


def show(
    job: Job,
    console: Console,
    devices: str = "",
    network_gb_per_s: float | None = None,
    plot: Path | None = None,
) -> None:
    """Prints the ranking, and draws it where a file is given. ValueError for what cannot be."""
    if plot is not None:
        refuse_without_library()
    configure_torch(threads_of(job), job.run.deterministic)
    start = read_start(job)
    network = None if network_gb_per_s is None else network_gb_per_s * 1e9
    machines = machines_of(job, start, devices, network)
    advice = advise(with_workers(job, machines.workers), start, machines)
    print_advice(advice, console)
    if plot is not None:
        draw(advice, plot)
        console.print(f"Drawn in {plot}", highlight=False, soft_wrap=True)
