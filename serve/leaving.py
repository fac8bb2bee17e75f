"""What a pod does when it has to go: its replicas are drained, and it waits for that.

    python -m serve.leaving --deadline-s 90

A preStop hook of the chart's workers. The controller is asked to take the machine out of service;
requests finish or move with their KV pages to others. Exit status 0 when nothing of ours is left on
this machine, or nothing ever was; 1 when time was too short or the cluster does not answer.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

LOOK_S = 0.5
CALL_S = 15.0


@click.command()
@click.option("--deadline-s", type=click.FloatRange(1, 3600), default=90.0, show_default=True)
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster.")
def leaving(deadline_s: float, address: str) -> None:
    """Drain the replicas of this Ray node and wait until they are gone."""
    import ray

    from cluster.raylocal.session import NAMESPACE

    end_s = time.monotonic() + deadline_s
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    try:
        left = leave(ray.get_runtime_context().get_node_id(), end_s)
    finally:
        ray.shutdown()
    if left:
        click.echo(f"still there after {deadline_s:g} s: {', '.join(left)}", err=True)
        sys.exit(1)
    click.echo("nothing is left on this machine")


def leave(node_id: str, end_s: float) -> Sequence[str]:
    """Drain the node's replicas by `end_s` (of time.monotonic); names of those that are left."""
    import ray

    from cluster.raylocal.actors import find
    from serve.actors import CONTROLLER, REPLICA_PREFIX

    controller = find(CONTROLLER)
    replicas = on_node(node_id, REPLICA_PREFIX)
    if controller is None or not replicas:
        return replicas
    machine = os.environ.get("POD_NAME", "")
    if machine:  # placed by name: nothing new may come here, either
        ray.get(controller.leave.remote(machine, end_s - time.monotonic()), timeout=CALL_S)
    for name in replicas:
        _drain(controller, name, end_s - time.monotonic())
    while (left := on_node(node_id, REPLICA_PREFIX)) and time.monotonic() < end_s:
        time.sleep(LOOK_S)
    return left


def _drain(controller: Any, replica_id: str, deadline_s: float) -> None:
    """Asked, not awaited. One that drains already goes on doing so."""
    import ray

    directory = ray.get(controller.watch.remote(0, 0.0), timeout=CALL_S)
    entry = directory.find(replica_id)
    if entry is not None and entry.phase != "draining":
        controller.drain.remote(replica_id, deadline_s)


def on_node(node_id: str, prefix: str) -> list[str]:
    """Names (without the prefix) of our living actors on a node, sorted."""
    from cluster.raylocal.private import actors_on_node

    found = [name for name in actors_on_node(node_id) if name.startswith(prefix)]
    return sorted(name.removeprefix(prefix) for name in found)


if __name__ == "__main__":
    leaving()
