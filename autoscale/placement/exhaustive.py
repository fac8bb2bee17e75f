"""The oracle for small problems: every count of machines, cheapest first, with every way to share
the slices out. It shares nothing with the programs that it judges but how a shape lies on a
machine.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate_columns import filling
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem

MOST_PLANS = 2_000_000
TOLERANCE = 1e-6  # of a machine
Way = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One offer with one shape: units of it may be bought."""

    offer: Offer
    shape: ReplicaShape
    machines: int
    replicas: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class ExhaustivePlanner:
    """slices: as in `AggregatePlanner`, but always a number. ValueError above MOST_PLANS counts."""

    slices: int = 1
    name: str = "exhaustive"

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        started_s = time.monotonic()
        buckets = [b for b, rate in problem.demand.requests_per_s.items() if rate > 0]
        choices = _choices(problem, buckets)
        for usd, counts in _by_cost(problem, choices, buckets):
            if time.monotonic() - started_s > deadline_s:
                raise TimeoutError(f"deadline_s of {deadline_s} is over; a longer one is accepted")
            if not _within_quota(choices, counts):
                continue
            ways = self._share_out(problem, choices, counts, buckets)
            if ways is not None:
                return _plan(problem, choices, counts, buckets, ways, usd, self.slices)
        raise InfeasibleError("no count of machines within the quotas serves all requests")

    def _share_out(
        self,
        problem: Problem,
        choices: Sequence[Choice],
        counts: Sequence[int],
        buckets: Sequence[Bucket],
    ) -> list[dict[Way, int]] | None:
        """Slices of each bucket by way, depth first; None where no way carries all. Choices that
        serve alike carry them together."""
        alike = _alike(choices)
        ways = _ways(choices, alike, counts)

        def deeper(at: int, room: tuple[float, ...]) -> list[dict[Way, int]] | None:
            if at == len(buckets):
                return []
            part = problem.demand.requests_per_s[buckets[at]] / self.slices
            usable = [way for way in ways if all(choices[c].rates[at] > 0 for c in way)]
            for split in _splits(self.slices, len(usable)):
                left = list(room)
                for way, parts in zip(usable, split, strict=True):
                    for c in way:
                        left[c] -= parts * part / choices[c].rates[at]
                if min(left, default=0.0) >= -TOLERANCE:
                    rest = deeper(at + 1, tuple(left))
                    if rest is not None:
                        return [dict(zip(usable, split, strict=True)), *rest]
            return None

        room = [0.0] * len(choices)
        for at, n in enumerate(counts):
            room[alike[at]] += n
        return deeper(0, tuple(room))


def _alike(choices: Sequence[Choice]) -> list[int]:
    """Of each choice, the first with as many replicas of the same shape."""
    kinds = [(choice.shape, choice.replicas) for choice in choices]
    return [kinds.index(kind) for kind in kinds]


def _choices(problem: Problem, buckets: Sequence[Bucket]) -> list[Choice]:
    every = []
    for offer in problem.catalog.offers(at_s=problem.at_s):
        for shape in problem.shapes:
            lies = filling(offer, shape) if shape.kind == offer.kind else None
            if lies is not None and shape.role != "training":
                rates = [_rate(problem, shape, bucket) * lies.replicas for bucket in buckets]
                every.append(Choice(offer, shape, lies.machines, lies.replicas, tuple(rates)))
    return every


def _rate(problem: Problem, shape: ReplicaShape, bucket: Bucket) -> float:
    tokens = bucket.input_tokens + (bucket.output_tokens if shape.role != "prefill" else 0)
    if problem.profile.kv_tokens(shape) < tokens:
        return 0.0
    return problem.profile.requests_per_s(shape, bucket, problem.demand.slo)


def _by_cost(
    problem: Problem, choices: Sequence[Choice], buckets: Sequence[Bucket]
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Counts up to what all requests on one choice alone would take, and its quota."""
    most = []
    for choice in choices:
        alone = sum(
            problem.demand.requests_per_s[bucket] / rate
            for bucket, rate in zip(buckets, choice.rates, strict=True)
            if rate > 0
        )
        quota = choice.offer.quota
        units = int(alone) + 1 if alone > 0 else 0
        most.append(units if quota is None else min(units, quota // choice.machines))
    plans = 1
    for units in most:
        plans *= units + 1
    if plans > MOST_PLANS:
        raise ValueError(f"{plans} counts of machines; accepted is up to {MOST_PLANS}")
    every = itertools.product(*(range(units + 1) for units in most))
    priced = (
        (sum(n * c.machines * c.offer.usd_per_h for n, c in zip(counts, choices, strict=True)),
         counts)
        for counts in every
    )  # fmt: skip
    yield from sorted(priced)


def _within_quota(choices: Sequence[Choice], counts: Sequence[int]) -> bool:
    held: dict[str, int] = {}
    for choice, n in zip(choices, counts, strict=True):
        held[choice.offer.name] = held.get(choice.offer.name, 0) + n * choice.machines
    return all(
        choice.offer.quota is None or held[choice.offer.name] <= choice.offer.quota
        for choice in choices
    )


def _ways(choices: Sequence[Choice], alike: Sequence[int], counts: Sequence[int]) -> list[Way]:
    """A request is served by one mixed choice, or by one prefill and one decode choice."""
    there = sorted({alike[at] for at, n in enumerate(counts) if n})
    ways: list[Way] = [(at,) for at in there if choices[at].shape.role == "mixed"]
    for first, then in itertools.product(there, there):
        if (choices[first].shape.role, choices[then].shape.role) == ("prefill", "decode"):
            ways.append((first, then))
    return ways


def _splits(parts: int, ways: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `parts` as a sum of so many counts."""
    if ways <= 1:
        if ways == 1:
            yield (parts,)
        return
    for first in range(parts, -1, -1):
        for rest in _splits(parts - first, ways - 1):
            yield (first, *rest)


def _plan(
    problem: Problem,
    choices: Sequence[Choice],
    counts: Sequence[int],
    buckets: Sequence[Bucket],
    ways: Sequence[dict[Way, int]],
    usd: float,
    slices: int,
) -> Plan:
    bought = [at for at, n in enumerate(counts) if n]
    place = {at: purchase for purchase, at in enumerate(bought)}
    purchases = []
    for at in bought:
        choice = choices[at]
        machines = counts[at] * choice.machines
        each = machines * choice.offer.usd_per_h
        replicas = counts[at] * choice.replicas
        purchases.append(Purchase(choice.offer.name, machines, choice.shape, replicas, each))
    alike = _alike(choices)
    of_first: dict[int, int] = {}
    for at in bought:
        of_first[alike[at]] = of_first.get(alike[at], 0) + counts[at]
    routing: dict[Bucket, dict[int, float]] = {bucket: {} for bucket in buckets}
    for bucket, parts in zip(buckets, ways, strict=True):
        for (way, n), at in itertools.product(parts.items(), bought):
            if n and alike[at] in way:
                shares = routing[bucket]
                part = n / slices * counts[at] / of_first[alike[at]]
                shares[place[at]] = shares.get(place[at], 0.0) + part
    source = (problem.profile.source,)
    return Plan(tuple(purchases), usd, usd, "exhaustive", routing=routing, sources=source)
