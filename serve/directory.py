"""Who serves: the controller's list of replicas, as the ingress and the decode replicas see it.

A directory is a value with a version; whoever watches asks for anything newer than what it has.
"""

from dataclasses import dataclass
from typing import Literal

from serve.state import ReplicaState, Role

Phase = Literal["starting", "ready", "draining"]


@dataclass(frozen=True)
class Entry:
    """One replica; `state` is its last answer to the controller's ping, None while starting."""

    replica_id: str
    role: Role
    phase: Phase
    state: ReplicaState | None = None


@dataclass(frozen=True)
class Directory:
    """All replicas of a service at one version (versions only grow, also across restarts).

    trouble: why the last replica that failed did, until one starts well. closing: the service is
    being taken down; what is open may finish, nothing new is taken.
    """

    version: int = 0
    entries: tuple[Entry, ...] = ()
    trouble: str | None = None
    closing: bool = False

    def ready(self, role: Role) -> list[Entry]:
        """Replicas of a role that take new work."""
        return [e for e in self.entries if e.role == role and e.phase == "ready"]

    def find(self, replica_id: str) -> Entry | None:
        return next((e for e in self.entries if e.replica_id == replica_id), None)
