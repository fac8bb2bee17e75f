"""Moving KV pages between replicas: one contract, several ways, chosen by `handoff.transport`.

The receiver pulls: it copies from what the sender lends into pages of its own, so nobody ever
writes into memory that another replica may have freed. serve/README.md says how to add one.
"""

from typing import cast

from cluster.registry import Registry
from serve.transport.contract import HandoffLost, Offer, PrefillReply, Transport

__all__ = [
    "TRANSPORTS",
    "HandoffLost",
    "Offer",
    "PrefillReply",
    "Transport",
    "open_transport",
]

TRANSPORTS = Registry(
    "handoff.transport",
    {
        "shared_memory": "serve.transport.shared_memory:SharedMemoryTransport",
        "ray_object": "serve.transport.ray_object:RayObjectTransport",
    },
)


def open_transport(name: str) -> Transport:
    """The transport of that name; ValueError names the known ones."""
    return cast(Transport, TRANSPORTS.load(name)())
