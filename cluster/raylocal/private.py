"""The few calls into Ray's private modules, in one place: Ray 2.60 reads its environment once.

Auth mode, token and "may this be a cluster of several machines" are read when Ray is imported and
kept; these functions make a process that has already imported Ray see the environment as it is
now. tests/cluster_ray/test_session.py starts sessions both ways and fails if a name moves.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""On Windows and macOS Ray confines a local cluster to 127.0.0.1 to spare people a firewall
dialogue, and this variable decides; "0" does the same on Linux. Without it the GCS, the raylet and
the agents listen on every interface, whatever `_node_ip_address` says."""


def reread_environment() -> None:
    """Make Ray, imported or not, use the auth mode, token and loopback choice of os.environ."""
    raylet: Any = importlib.import_module("ray._raylet")
    constants: Any = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK_VARIABLE) != "0"
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def forget_serve() -> None:
    """Drop Serve's cached connection, which would outlive the cluster that it belongs to."""
    if "ray.serve.context" in sys.modules:
        sys.modules["ray.serve.context"]._set_global_client(None)


def actors_on_node(node_id: str) -> list[str]:
    """Names of the living named actors on a node (its id in hex) of the connected cluster."""
    state: Any = importlib.import_module("ray._private.state")
    found = state.actors(actor_state_name="ALIVE").values()
    return [str(a["Name"]) for a in found if a["Name"] and a["Address"]["NodeID"] == node_id]


def draining_nodes() -> dict[str, float]:
    """Nodes of the connected cluster that are told to go: id (hex) to the Unix time, in seconds,
    at which they do; 0 where no time was said."""
    state: Any = importlib.import_module("ray._private.state")
    return {
        node: deadline_ms / 1000 for node, deadline_ms in state.state.get_draining_nodes().items()
    }


def drain_node(address: str, node: str, reason: str, notice_s: float) -> None:
    """Tell Ray that a node (id in hex) of the cluster at `address` is taken in notice_s seconds.

    Nothing new is placed there, and `draining_nodes` shows it; ending it stays its owner's duty.
    RuntimeError if Ray refuses.
    """
    raylet: Any = importlib.import_module("ray._raylet")
    autoscaler: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    preempted = autoscaler.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + notice_s) * 1000)
    taken, why = raylet.GcsClient(address=address).drain_node(node, preempted, reason, deadline_ms)
    if not taken:
        raise RuntimeError(f"node {node} is not drained: {why}")


def confine_replica() -> None:
    """Bind the calling Serve replica's internal gRPC port to loopback instead of every interface.

    Serve opens it on [::] whatever the HTTP host is, and what it accepts is unpickled (it asks for
    the cluster's token if there is one). Call from the `__init__` of a deployment's class: the port
    is opened after it. For sessions on one machine; others need the port to be reachable.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    bind: Callable[[Any, str], int] = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return bind(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = on_loopback
