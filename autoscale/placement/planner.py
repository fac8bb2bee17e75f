"""What every planner is: demand, offers and profiles in, a plan out, in bounded time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.model import ModelSize
from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import Plan, ReplicaShape


class InfeasibleError(ValueError):
    """No plan meets the demand; says what binds (memory, SLO, quota) and by how much."""


class Catalog(Protocol):
    """Kinds and offers, the latter as they are (or were) at a time."""

    def kind(self, name: str) -> GpuKind: ...

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]: ...


class ThroughputProfile(Protocol):
    """How fast replicas are. source: "measured on …", "table of …" or "roofline", printed with each
    plan that rests on it."""

    @property
    def source(self) -> str: ...

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        """Most requests of the bucket that one replica serves within the SLO; 0 if it cannot."""
        ...

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """Tokens whose keys and values fit beside the weights of one replica; 0 if weights do not
        fit."""
        ...


@dataclass(frozen=True)
class Problem:
    """All that a planner is given. current: what runs now, so that moving has a price. model: its
    size, for who counts memory; None where the profile's kv_tokens is all that is known."""

    demand: Demand
    catalog: Catalog
    profile: ThroughputProfile
    shapes: Sequence[ReplicaShape]
    current: Plan | None = None
    at_s: float | None = None
    model: ModelSize | None = None


class Planner(Protocol):
    """Anytime: gives its best plan and bound when deadline_s is over. InfeasibleError when it has
    proved that there is none."""

    @property
    def name(self) -> str: ...

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan: ...
