"""Every number of every unit tried, whether it serves the demand by a linear program of its own;
and random small problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

import numpy as np
from scipy.optimize import linprog

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape, Role
from autoscale.placement.planner import Problem


@dataclass(frozen=True)
class Shop:
    """A catalogue of given offers."""

    on_offer: tuple[Offer, ...]

    def kind(self, name: str) -> GpuKind:
        return GpuKind(name, 80 * 10**9, 100.0, 1000.0, 10.0)

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]:
        return self.on_offer


@dataclass
class Table:
    """Requests per second by shape and bucket."""

    per_s: dict[tuple[ReplicaShape, Bucket], float]
    source: str = "made up"

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return self.per_s[shape, bucket]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return 10_000


def cheapest(problem: Problem) -> float:
    """The least cost over all numbers of machines up to the quotas; inf where none serves."""
    choices = []
    for offer in problem.catalog.offers():
        shapes = [s for s in problem.shapes if s.kind == offer.kind and s.tensor <= offer.count]
        assert offer.quota is not None
        options = [
            n
            for n in product(range(offer.quota + 1), repeat=len(shapes))
            if sum(k * _machines(offer, s) for k, s in zip(n, shapes, strict=True)) <= offer.quota
        ]
        choices.append([(offer, shapes, n) for n in options])
    least = inf
    for combination in product(*choices):
        bought = [
            (offer, shape, count)
            for offer, shapes, counts in combination
            for shape, count in zip(shapes, counts, strict=True)
            if count
        ]
        usd = sum(offer.usd_per_h * n * _machines(offer, shape) for offer, shape, n in bought)
        if usd < least and serves(problem, bought):
            least = usd
    return least


def _machines(offer: Offer, shape: ReplicaShape) -> int:
    return -(-shape.tensor * shape.pipeline // offer.count)


def serves(problem: Problem, bought: list[tuple[Offer, ReplicaShape, int]]) -> bool:
    """Whether requests can be shared out so that no replica is asked for more than it serves."""
    buckets = list(problem.demand.requests_per_s)
    pairs = [(n, b) for n in range(len(bought)) for b in range(len(buckets))]
    if not pairs:
        return False
    rates = {}
    for n, (offer, shape, count) in enumerate(bought):
        replicas = count * max(1, offer.count // (shape.tensor * shape.pipeline))
        for b, bucket in enumerate(buckets):
            rates[n, b] = replicas * problem.profile.requests_per_s(shape, bucket, Slo())
    load = np.zeros((len(bought), len(pairs)))
    for column, (n, b) in enumerate(pairs):
        asked = problem.demand.requests_per_s[buckets[b]]
        load[n, column] = asked / rates[n, b] if rates[n, b] else 0.0
    covers = [
        [float(p[1] == b and bought[p[0]][1].role in ("mixed", phase)) for p in pairs]
        for b in range(len(buckets))
        for phase in ("prefill", "decode")
    ]
    bounds = [(0.0, 1.0 if rates[pair] else 0.0) for pair in pairs]
    solved = linprog(
        np.zeros(len(pairs)), load, np.ones(len(bought)), covers, np.ones(len(covers)), bounds
    )
    return bool(solved.status == 0)


def random_problem(random: np.random.Generator) -> Problem:
    """One or two offers, up to three shapes of each kind, one or two buckets."""
    buckets = [Bucket(100 * (n + 1), 50) for n in range(int(random.integers(1, 3)))]
    roles: tuple[Role, ...] = ("prefill", "decode", "mixed")
    offers, shapes = [], list[ReplicaShape]()
    for number in range(int(random.integers(1, 3))):
        kind, count = f"k{number}", int(random.choice([1, 2, 4]))
        price, quota = float(random.integers(1, 10)), int(random.integers(1, 5))
        offers.append(Offer(f"o{number}", kind, count, "r", "z", "on_demand", price, quota))
        for role in roles:
            if random.random() < 0.85:
                shapes.append(ReplicaShape(kind, int(random.choice([1, 2])), 1, role))
    per_s = {(shape, bucket): _rate(random, shape) for shape in shapes for bucket in buckets}
    demand = Demand({bucket: float(random.uniform(1, 12)) for bucket in buckets})
    return Problem(demand, Shop(tuple(offers)), Table(per_s), shapes)


def _rate(random: np.random.Generator, shape: ReplicaShape) -> float:
    if random.random() < 0.1:
        return 0.0
    fast = 1.7 if shape.tensor == 2 else 1.0
    return float(np.round(fast * random.uniform(1, 4 if shape.role == "mixed" else 8), 3))
