"""Random problems for the aggregate planners, and the paper's own formulation as a peer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate_columns import Column
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import Problem

Key = tuple[ReplicaShape, Bucket]


@dataclass(frozen=True)
class Shelf:
    """A catalogue of these offers."""

    of: tuple[Offer, ...]

    def kind(self, name: str) -> GpuKind:
        return GpuKind(name, 2**34, 100.0, 1000.0, 50.0)

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]:
        return self.of


@dataclass(frozen=True)
class Rates:
    """A profile of these rates; memory for every request unless said."""

    rates: dict[Key, float]
    room_tokens: dict[ReplicaShape, int] = field(default_factory=dict)
    source: str = "made for a test"

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return self.rates.get((shape, bucket), 0.0)

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return self.room_tokens.get(shape, 10**9)


def small_problem(rng: np.random.Generator, *, apart: bool = False) -> Problem:
    """Up to three kinds, two shapes each, few buckets: an exhaustive search ends. One in about five
    is infeasible, by quota, memory or speed. apart: some shapes are for prefill, some for
    decode."""
    kinds = [f"kind{n}" for n in range(int(rng.integers(1, 4)))]
    buckets = [Bucket(100 * (n + 1), 50 * (n + 1)) for n in range(int(rng.integers(1, 4)))]
    shapes: list[ReplicaShape] = []
    for kind in kinds:
        roles = ["mixed", "prefill", "decode"] if apart and rng.random() < 0.7 else ["mixed"]
        tensor = int(rng.choice([1, 2]))
        shapes += [ReplicaShape(kind, tensor, 1, role) for role in roles]  # type: ignore[arg-type]
        if len(kinds) == 1 or rng.random() < 0.3:
            shapes.append(ReplicaShape(kind, 4 // tensor))
    offers = [_offer(rng, kind, n) for kind in kinds for n in range(int(rng.integers(1, 3)))]
    return Problem(
        Demand({bucket: float(rng.uniform(0.2, 2.0)) for bucket in buckets}),
        Shelf(tuple(offers[:4])),
        _rates(rng, shapes, buckets),
        tuple(shapes[:5]),
    )


def _offer(rng: np.random.Generator, kind: str, number: int) -> Offer:
    quota = None if rng.random() < 0.5 else int(rng.integers(0, 4))
    price = round(float(rng.uniform(0.5, 8.0)), 2)
    count = int(rng.choice([1, 2, 4]))
    return Offer(f"{kind}-{number}", kind, count, "r", f"z{number}", "on_demand", price, quota)


def _rates(
    rng: np.random.Generator, shapes: Sequence[ReplicaShape], buckets: Sequence[Bucket]
) -> Rates:
    rates: dict[Key, float] = {}
    room: dict[ReplicaShape, int] = {}
    for shape in shapes:
        speed = float(rng.uniform(0.6, 3.0)) * shape.accelerators**0.8
        speed *= 1.0 if shape.role == "mixed" else 1.8
        for number, bucket in enumerate(buckets):
            lost = rng.random() < 0.08
            rates[shape, bucket] = 0.0 if lost else speed / (1 + number * float(rng.uniform(0, 1)))
        if rng.random() < 0.15:
            room[shape] = int(rng.integers(0, 500))
    return Rates(rates, room)


def large_problem(rng: np.random.Generator) -> Problem:
    """Of the size of the paper's: 8 to 24 buckets, three or four kinds, one GPU per machine."""
    prices = rng.uniform(0.4, 8.0, int(rng.integers(3, 5))).round(2)
    sizes = np.sort(rng.uniform(0.2, 3.0, int(rng.integers(8, 25))))
    buckets = [Bucket(100 * (n + 1), 100) for n in range(len(sizes))]
    scale = float(rng.uniform(0.5, 2.0))
    shapes = [ReplicaShape(f"kind{n}") for n in range(len(prices))]
    rates = {
        (shape, bucket): float(price / size * rng.uniform(0.5, 1.5) * scale)
        for shape, price in zip(shapes, prices, strict=True)
        for bucket, size in zip(buckets, sizes, strict=True)
        if rng.random() > 0.05
    }
    total = float(rng.choice([1, 2, 4, 8, 16, 32]))
    asked = rng.dirichlet(np.ones(len(buckets))) * total
    offers = [
        Offer(shape.kind, shape.kind, 1, "r", "z", "on_demand", float(price))
        for shape, price in zip(shapes, prices, strict=True)
    ]
    demand = Demand({bucket: float(r) for bucket, r in zip(buckets, asked, strict=True)})
    return Problem(demand, Shelf(tuple(offers)), Rates(rates), tuple(shapes))


def papers_cost(
    of: Sequence[Column], asked: Sequence[float], slices: int, limit_s: float = 60.0
) -> float | None:
    """Melange's program as the paper has it (section 5.4): a 0/1 unknown for each slice and GPU, a
    count for each GPU; None where there is no plan. AssertionError where the time is over."""
    parts, kinds = len(asked) * slices, len(of)
    loads = np.zeros((parts, kinds))
    able = np.zeros((parts, kinds))
    for k, column in enumerate(of):
        rates = np.repeat(np.array(column.requests_per_s), slices)
        able[:, k] = rates > 0
        each = np.repeat(np.array(asked), slices) / slices
        loads[:, k] = np.divide(each, rates, out=np.zeros(parts), where=rates > 0)
    if not able.any(axis=1).all():
        return None
    x = np.arange(parts * kinds).reshape(parts, kinds)
    once = csr_matrix(
        (np.ones(parts * kinds), (np.repeat(np.arange(parts), kinds), x.ravel())),
        shape=(parts, parts * kinds + kinds),
    )
    row = np.concatenate([np.tile(np.arange(kinds), parts), np.arange(kinds)])
    col = np.concatenate([x.ravel(), parts * kinds + np.arange(kinds)])
    value = np.concatenate([loads.ravel(), -np.ones(kinds)])
    within = csr_matrix((value, (row, col)), shape=(kinds, parts * kinds + kinds))
    answer = milp(
        np.concatenate([np.zeros(parts * kinds), [column.usd_per_h for column in of]]),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(within, -np.inf, 0)],
        integrality=np.ones(parts * kinds + kinds, dtype=np.int64),
        bounds=Bounds(0, np.concatenate([able.ravel(), [column.most for column in of]])),
        options={"time_limit": limit_s, "mip_rel_gap": 0.0},
    )
    assert answer.status in (0, 2), answer.message
    return float(answer.fun) if answer.status == 0 else None
