"""Local machines that are Ray nodes: each a raylet of its own, with its workers, in a cluster.

A node's labels say which machine it is and how it was bought, so that replicas are placed by them;
accelerators are numbers that Ray counts, nothing else.
"""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from autoscale.catalog.offer import Offer
from autoscale.providers.local.bodies import ProcessBodies, Start
from serve.places import MACHINE_LABEL

OFFER_LABEL, MARKET_LABEL, ZONE_LABEL = (
    "sanderling/offer",
    "sanderling/market",
    "sanderling/zone",
)
OBJECT_STORE_BYTES = 160 << 20


def ray_bodies(
    folder: Path, address: str, *, cpus: float = 1.0, environment: Mapping[str, str] | None = None
) -> ProcessBodies:
    """Nodes of the cluster at `address` (host:port), with so many CPUs each to hand out. The caller
    is connected to that cluster; environment: what lets a node in."""

    def describe(machine_id: str, offer: Offer) -> Start:
        return Start((*_COMMAND, *_arguments(address, machine_id, offer, cpus)), environment or {})

    return ProcessBodies(folder, describe, joined)


def joined(machine_id: str) -> bool:
    """Whether a machine is a living node of the cluster that this process is connected to."""
    ray: Any = import_module("ray")
    labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    return any(each.get(MACHINE_LABEL) == machine_id for each in labels)


_COMMAND = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block")


def _arguments(address: str, machine_id: str, offer: Offer, cpus: float) -> tuple[str, ...]:
    labels = {
        MACHINE_LABEL: machine_id,
        OFFER_LABEL: offer.name,
        MARKET_LABEL: offer.market,
        ZONE_LABEL: offer.zone,
    }
    return (
        *("--address", address, "--num-cpus", f"{cpus:g}"),
        *("--labels", ",".join(f"{name}={value}" for name, value in labels.items())),
        *("--resources", json.dumps({f"accelerator:{offer.kind}": float(offer.count)})),
        *("--object-store-memory", str(OBJECT_STORE_BYTES)),
        *("--disable-usage-stats", "--include-log-monitor", "false"),
    )
