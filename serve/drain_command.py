"""The command `drain`: take one replica out of service before a deadline.

It asks the controller as a visitor of the session: a replacement is started, requests finish or
move with their KV, and the replica is stopped. Imported by the CLI.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.options import Resolved, with_settings

if TYPE_CHECKING:
    from serve.directory import Directory


@click.command()
@click.argument("replica_id", metavar="REPLICA")
@click.option("--deadline-s", type=click.FloatRange(0), default=30.0, show_default=True)
@with_settings()
def drain(resolved: Resolved, replica_id: str, deadline_s: float) -> None:
    """Have a replica's requests finish or move within a deadline, then stop it."""
    import ray

    from cluster.raylocal.actors import find
    from cluster.raylocal.session import attach
    from serve.actors import CONTROLLER

    attach(Path(resolved.settings.data_dir))
    try:
        controller = find(CONTROLLER)
        if controller is None:
            raise ValueError("the session has no controller; `sanderling status` says more")
        refuse_unknown(ray.get(controller.watch.remote(0, 0.0)), replica_id)
        ray.get(controller.drain.remote(replica_id, deadline_s))
        click.echo(f"{replica_id} is gone")
    finally:
        ray.shutdown()


def refuse_unknown(directory: "Directory", replica_id: str) -> None:
    """ValueError that names the replicas there are when this is none of them, or on its way out."""
    entry = directory.find(replica_id)
    if entry is None:
        known = ", ".join(sorted(e.replica_id for e in directory.entries)) or "none"
        raise ValueError(f"there is no replica {replica_id!r}; running are: {known}")
    if entry.phase == "draining":
        raise ValueError(f"{replica_id!r} is being drained already")
