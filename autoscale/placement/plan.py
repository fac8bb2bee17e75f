"""A plan: what to buy, in which shapes and roles, which layers where, who serves whom, and how good
that is known to be. Frozen data; made by a planner, checked by `feasible`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autoscale.placement.demand import Bucket

Role = Literal["mixed", "prefill", "decode", "training"]


@dataclass(frozen=True)
class ReplicaShape:
    """How one copy of a model lies on accelerators of one kind: `tensor` of them share each layer,
    `pipeline` stages follow each other. weight_bits: of the stored weights."""

    kind: str
    tensor: int = 1
    pipeline: int = 1
    role: Role = "mixed"
    weight_bits: int = 16

    @property
    def accelerators(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Purchase:
    """`machines` of the offer of that name, holding `replicas` of a shape between them."""

    offer: str
    machines: int
    shape: ReplicaShape
    replicas: int
    usd_per_h: float  # for all of its machines


@dataclass(frozen=True)
class LayerSpan:
    """Layers start..stop-1 of a model on one node, where one copy spans unlike nodes."""

    node: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What a planner found.

    routing: of each bucket, the share that each purchase (by its place in `purchases`) serves.
    flow_tokens_per_s: over each link (from, to) between spans. bound_usd_per_h: no plan costs less;
    gap: (cost - bound) / cost, 0 where the plan is proved best. limits: what binds it, as
    "memory", "slo", "quota". sources: where each number of the decision comes from.
    risk_usd_per_h: what losses on spot markets are expected to cost beyond the bills; where a
    planner counts it, no plan's bills and risk together go below bound_usd_per_h + risk_usd_per_h.
    """

    purchases: tuple[Purchase, ...]
    usd_per_h: float
    bound_usd_per_h: float
    solver: str
    spans: tuple[LayerSpan, ...] = ()
    routing: Mapping[Bucket, Mapping[int, float]] = field(default_factory=dict)
    flow_tokens_per_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    solved_s: float = 0.0
    risk_usd_per_h: float = 0.0

    @property
    def gap(self) -> float:
        if self.usd_per_h <= 0:
            return 0.0
        return max(0.0, (self.usd_per_h - self.bound_usd_per_h) / self.usd_per_h)
