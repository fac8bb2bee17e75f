"""What a replica says of itself: read by the controller, the ingress and `sanderling status`."""

from dataclasses import dataclass
from typing import Literal

from serve.engine.stats import EngineStats

Role = Literal["prefill", "decode"]


@dataclass(frozen=True)
class ReplicaState:
    """A replica's answer to a ping. `failure` is a sentence when it can serve no more.

    silent_s: seconds since its engine last took a step or was seen idle.
    leases: offers not yet acknowledged (prefill). handed_bytes: KV received (decode).
    """

    replica_id: str
    role: Role
    failure: str | None
    silent_s: float
    draining: bool
    leases: int
    handed_bytes: int
    remote_prefills: int
    local_prefills: int
    stats: EngineStats
