"""The command `share`: a model served and a job trained on one machine, by one allocator."""

import asyncio
import sys
from pathlib import Path

import click

from cluster.options import Resolved, with_settings
from cluster.raylocal.front import refuse_taken_port
from cluster.registry import load

# A name instead of an import: nothing here knows how a job trains.
JOB = "train.elastic.shared:SharedJob"


@click.command()
@click.argument("job", type=click.Path(path_type=Path, exists=True))
@with_settings("model", "host", "port")
def share(resolved: Resolved, job: Path) -> None:
    """Serve a model and train JOB (a TOML file) on this machine, until Ctrl-C.

    The job has workers.count machines and serving autoscale.decode.floor; a machine is a process.
    While serving is short the job gives some up, and gets them back afterwards.
    """
    settings = resolved.settings
    if settings.autoscale.policy != "on_demand":
        raise ValueError(
            f"autoscale.policy = {settings.autoscale.policy!r} buys on a market, and there is none "
            "on one machine; autoscale.policy = 'on_demand' is accepted"
        )
    refuse_taken_port(settings)
    from autoscale.providers.share import Sharing
    from models.resolve import resolve as find_model

    find_model(settings.model)  # refused here, before anything is started
    trained = load(JOB)(job)
    with trained:
        asyncio.run(Sharing(settings, trained, click.echo).run())
    click.echo(f"{trained.name}: {trained.said()}")
    sys.exit(1 if trained.failure else 0)
