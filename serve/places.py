"""Replicas on named machines: which machine a replica is on stands in its id.

So a controller that comes back after a crash learns it with the names of the replicas that run, and
whoever reads a log sees it. Names of shared memory are made of such ids, so they hold a dot and
nothing stranger.
"""

MACHINE_LABEL = "sanderling/machine"
"""What a Ray node is labelled with so that replicas can be placed on it by name."""


def on_machine(name: str, machine: str) -> str:
    """`name` on a machine; without one (""), the name alone."""
    return f"{name}.{machine}" if machine else name


def machine_of(replica_id: str) -> str:
    """The machine that a replica was placed on; "" for one that may be anywhere."""
    return replica_id.partition(".")[2]
