"""The command `scale`: another number of replicas of a role, while the service runs.

It asks the controller as a visitor of the session; replicas that are too many finish or send away
what they have. Imported by the CLI.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from cluster.options import Resolved, with_settings
from serve.state import Role

if TYPE_CHECKING:
    from serve.directory import Directory

MOST = 1024
FEWEST = {"decode": 1, "prefill": 0}


@click.command()
@click.argument("wanted", nargs=-1, required=True, metavar="ROLE=N...")
@click.option("--drain-s", type=click.FloatRange(0), default=30.0, show_default=True)
@with_settings()
def scale(resolved: Resolved, wanted: tuple[str, ...], drain_s: float) -> None:
    """Change how many replicas run: `sanderling scale decode=2 prefill=0`."""
    import ray

    from cluster.raylocal.actors import find
    from cluster.raylocal.session import attach
    from serve.actors import CONTROLLER

    numbers = dict(parse(word) for word in wanted)
    attach(Path(resolved.settings.data_dir))
    try:
        controller = find(CONTROLLER)
        if controller is None:
            raise ValueError("the session has no controller; `sanderling status` says more")
        for role, number in numbers.items():
            ray.get(controller.scale.remote(role, number, drain_s))
        end_s = time.monotonic() + resolved.settings.controller.start_deadline_s + drain_s
        while True:
            directory = ray.get(controller.watch.remote(0, 0.0))
            if settled(directory, numbers):
                click.echo(", ".join(f"{role}: {n} ready" for role, n in numbers.items()))
                return
            if time.monotonic() > end_s:
                text = f"not so in time: {directory.trouble or 'replicas are still starting'}"
                raise click.ClickException(text)
            time.sleep(0.2)
    finally:
        ray.shutdown()


def parse(word: str) -> tuple[Role, int]:
    """ "decode=2" as a role and a number. ValueError for anything else."""
    role, _, number = word.partition("=")
    fewest = FEWEST.get(role)
    if fewest is None or not number.isdecimal() or not fewest <= int(number) <= MOST:
        raise ValueError(
            f"{word!r} is not accepted; decode=N takes 1 to {MOST}, prefill=N takes 0 to {MOST}"
        )
    return cast(Role, role), int(number)


def settled(directory: "Directory", wanted: dict[Role, int]) -> bool:
    """Whether exactly so many replicas of each role exist, all of them ready."""
    for role, number in wanted.items():
        phases = [entry.phase for entry in directory.entries if entry.role == role]
        if phases != ["ready"] * number:
            return False
    return True
