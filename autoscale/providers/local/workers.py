"""Local machines that can hold replicas of the served model: serve's worker processes."""

import socket
import sys
from pathlib import Path

from autoscale.catalog.offer import Offer
from autoscale.providers.local.bodies import ProcessBodies, Start
from serve.machines.clients import socket_of
from serve.runfiles import own_python_path


def worker_bodies(folder: Path) -> ProcessBodies:
    """Machines whose sockets are in `folder`, which keeps strangers out; usable once they answer
    there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def describe(machine_id: str, _: Offer) -> Start:
        where = str(socket_of(folder, machine_id))
        return Start((sys.executable, "-m", "serve.machines.worker", where), own_python_path())

    def answers(machine_id: str) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(socket_of(folder, machine_id)))
        except OSError:
            return False
        return True

    return ProcessBodies(folder, describe, answers)
