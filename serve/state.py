"""What a replica says of itself: read by the controller, the ingress and `sanderling status`."""

from dataclasses import dataclass
from typing import Literal

from serve.engine.stats import EngineStats

Role = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Migrated:
    """Requests that a decode replica took over with their KV: how many, the tokens and bytes that
    crossed for them, and how many had to be computed again after all."""

    requests: int = 0
    tokens: int = 0
    bytes: int = 0
    failed: int = 0

    def plus(
        self, requests: int = 0, tokens: int = 0, bytes: int = 0, failed: int = 0
    ) -> "Migrated":
        """The sums."""
        return Migrated(
            self.requests + requests,
            self.tokens + tokens,
            self.bytes + bytes,
            self.failed + failed,
        )


@dataclass(frozen=True)
class ReplicaState:
    """A replica's answer to a ping. `failure` is a sentence when it can serve no more.

    silent_s: seconds since its engine last took a step or was seen idle.
    leases: offers not yet acknowledged. handed_bytes: KV received from prefill (decode).
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
    migrated: Migrated = Migrated()
