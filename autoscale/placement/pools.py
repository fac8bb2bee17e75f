"""How many prefill, decode and mixed replicas of which kinds: pools for phases apart (DistServe,
OSDI 24; Splitwise, ISCA 24), on unlike GPUs, at least cost.

An integer program over machines of each offer and shape; requests of each bucket are shared out
between replicas, once for their prompts and once for their answers, a mixed replica taking both.
What a replica serves comes from the profile. Where the profile knows times of steps, the pools are
then simulated: the capacities are taken a little lower until the SLO holds in the simulation, or
higher while it does, since a pool waits less than its replicas would alone."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import StepTimes
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.pools_simulation import saturated_per_s, simulated

MOST_UNITS = 10_000
# Of the capacities while simulating: how far to step, when to stop, how often at most.
STEP, NEAR, STEPS = 1.3, 1.02, 14


@dataclass(frozen=True)
class Unit:
    """The least that can be bought of an offer for a shape: some machines, and the replicas on
    them. per_s: most requests of each bucket on all of these replicas."""

    offer: Offer
    shape: ReplicaShape
    machines: int
    replicas: int
    per_s: Mapping[Bucket, float]

    @property
    def usd_per_h(self) -> float:
        return self.machines * self.offer.usd_per_h


@dataclass(frozen=True)
class Sized:
    """How many of each unit, which share of each bucket each serves, and a bound on the cost."""

    counts: tuple[int, ...]
    shares: Mapping[Bucket, Mapping[int, float]]
    usd_per_h: float
    bound_usd_per_h: float


def units(problem: Problem, *, saturated: bool = False) -> list[Unit]:
    """Everything that can be bought and serves something. saturated: what it serves at full load,
    whatever the SLO."""
    found = []
    for offer in problem.catalog.offers(at_s=problem.at_s):
        for shape in problem.shapes:
            if shape.kind != offer.kind or shape.tensor > offer.count:
                continue
            machines = -(-shape.accelerators // offer.count)
            replicas = max(1, offer.count // shape.accelerators)
            per_s = {
                bucket: replicas * _per_s(problem, shape, bucket, saturated)
                for bucket in problem.demand.requests_per_s
            }
            if any(rate > 0 for rate in per_s.values()):
                found.append(Unit(offer, shape, machines, replicas, per_s))
    return found


def _per_s(problem: Problem, shape: ReplicaShape, bucket: Bucket, saturated: bool) -> float:
    if saturated and isinstance(problem.profile, StepTimes):
        return saturated_per_s(problem.profile, problem.profile.kv_tokens(shape), shape, bucket)
    return problem.profile.requests_per_s(shape, bucket, problem.demand.slo)


class PoolsPlanner:
    """The cheapest pools. Give shapes of the roles "prefill", "decode" and "mixed".

    beyond_profile: let replicas serve more than the profile says of one alone, as far as the
    simulated pool keeps the SLO; without, the simulation only takes capacities back.
    """

    name = "pools"

    def __init__(self, *, beyond_profile: bool = False) -> None:
        self._beyond = beyond_profile

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        """InfeasibleError with the bucket that nothing serves, or the quota that binds."""
        began = time.monotonic()
        deadline = began + deadline_s
        offered = units(problem)
        if not isinstance(problem.profile, StepTimes):
            sized = size(offered, problem, deadline=deadline)
            return _as_plan(sized, offered, problem, began, simulated_=None)
        sized, held = self._refined(offered, problem, deadline)
        most = units(problem, saturated=True) if self._beyond else offered
        limit = size(most, problem, deadline=deadline + 1.0)
        bounded = Sized(
            sized.counts, sized.shares, sized.usd_per_h, min(limit.bound_usd_per_h, sized.usd_per_h)
        )
        return _as_plan(bounded, offered, problem, began, simulated_=held)

    def _refined(
        self, offered: Sequence[Unit], problem: Problem, deadline: float
    ) -> tuple[Sized, float]:
        """The cheapest sizing whose simulation keeps the SLO, and the share that keeps it."""
        slo = problem.demand.slo
        best, capacity, good, bad, held = None, 1.0, 0.0, inf, 0.0
        for number in range(STEPS):
            try:
                sized = size(offered, problem, deadline=deadline, capacity=capacity)
            except InfeasibleError:
                if number == 0:
                    raise
                break  # no quota left for lower capacities
            held = simulated(_as_plan(sized, offered, problem, 0.0, simulated_=None), problem)
            if held >= slo.attained:
                good = capacity
                if best is None or sized.usd_per_h < best[0].usd_per_h:
                    best = sized, held
            else:
                bad = capacity
            enough = good >= 1.0 and not self._beyond
            if enough or bad <= NEAR * good or time.monotonic() > deadline:
                break
            capacity = good * STEP if bad == inf else sqrt(good * bad) if good else bad / STEP
        if best is None:
            raise InfeasibleError(
                f"SLO: in the simulation {held:.1%} keep it where {slo.attained:.1%} should, even "
                f"at {capacity:.0%} of the profile's capacities"
            )
        return best


def size(
    offered: Sequence[Unit], problem: Problem, *, deadline: float, capacity: float = 1.0
) -> Sized:
    """The integer program, every unit serving `capacity` times what it says. InfeasibleError with
    what binds."""
    buckets = list(problem.demand.requests_per_s)
    _check_served(offered, buckets)
    program = _Program(offered, problem, buckets, capacity)
    solved = milp(
        program.cost,
        constraints=LinearConstraint(program.rows, program.low, program.high),
        integrality=program.whole,
        bounds=Bounds(0, program.upper),
        options={"time_limit": max(0.1, deadline - time.monotonic()), "mip_rel_gap": 1e-9},
    )
    if solved.x is None:
        if solved.status == 2:
            raise InfeasibleError("quota: all that may be bought serves less than the demand")
        raise InfeasibleError("no sizing found before the deadline; give more time")
    values = np.asarray(solved.x, dtype=np.float64)
    counts = tuple(round(count) for count in values[: len(offered)].tolist())
    cost = sum(n * unit.usd_per_h for n, unit in zip(counts, offered, strict=True))
    bound = cost if solved.mip_dual_bound is None else min(cost, float(solved.mip_dual_bound))
    return Sized(counts, program.shares(values), cost, bound)


def _check_served(offered: Sequence[Unit], buckets: Sequence[Bucket]) -> None:
    for bucket in buckets:
        for phase in ("prefill", "decode"):
            roles = ("mixed", phase)
            if not any(u.per_s[bucket] > 0 and u.shape.role in roles for u in offered):
                raise InfeasibleError(
                    f"SLO or memory: no shape on offer serves the {phase} of {tuple(bucket)}"
                )


class _Program:
    """Columns: of each unit how many, then of each unit and bucket the share that it serves."""

    def __init__(
        self,
        offered: Sequence[Unit],
        problem: Problem,
        buckets: Sequence[Bucket],
        capacity: float,
    ) -> None:
        self._offered, self._buckets = offered, buckets
        count, width = len(offered), len(buckets)
        columns = count + count * width
        self.cost = np.zeros(columns)
        self.cost[:count] = [unit.usd_per_h for unit in offered]
        self.whole = np.array([1] * count + [0] * (count * width))
        able = [float(unit.per_s[bucket] > 0) for unit in offered for bucket in buckets]
        self.upper = np.array([float(MOST_UNITS)] * count + able)
        rows: list[tuple[NDArray[np.float64], float, float]] = []
        for n, unit in enumerate(offered):  # what a unit serves is at most what it can
            row = np.zeros(columns)
            row[n] = -capacity
            for b, bucket in enumerate(buckets):
                if unit.per_s[bucket] > 0:
                    load = problem.demand.requests_per_s[bucket] / unit.per_s[bucket]
                    row[count + n * width + b] = load
            rows.append((row, -inf, 0.0))
        for phase in ("prefill", "decode"):
            for b in range(width):
                row = np.zeros(columns)
                for n, unit in enumerate(offered):
                    row[count + n * width + b] = unit.shape.role in ("mixed", phase)
                rows.append((row, 1.0, 1.0))
        for offer in {unit.offer.name: unit.offer for unit in offered}.values():
            if offer.quota is not None:
                row = np.zeros(columns)
                row[:count] = [u.machines * (u.offer.name == offer.name) for u in offered]
                rows.append((row, 0.0, float(offer.quota)))
        self.rows = np.array([row for row, _, _ in rows])
        self.low = np.array([low for _, low, _ in rows])
        self.high = np.array([high for _, _, high in rows])

    def shares(self, values: NDArray[np.float64]) -> dict[Bucket, dict[int, float]]:
        """By unit, of each bucket; those that serve none left out."""
        count, width = len(self._offered), len(self._buckets)
        by_unit = values[count:].reshape(count, width)
        return {
            bucket: {n: float(by_unit[n, b]) for n in range(count) if by_unit[n, b] > 1e-9}
            for b, bucket in enumerate(self._buckets)
        }


def _as_plan(
    sized: Sized,
    offered: Sequence[Unit],
    problem: Problem,
    began: float,
    *,
    simulated_: float | None,
) -> Plan:
    bought = [n for n, count in enumerate(sized.counts) if count]
    place = {n: position for position, n in enumerate(bought)}
    purchases = tuple(
        Purchase(
            offered[n].offer.name,
            sized.counts[n] * offered[n].machines,
            offered[n].shape,
            sized.counts[n] * offered[n].replicas,
            sized.counts[n] * offered[n].usd_per_h,
        )
        for n in bought
    )
    solver = "pools: integer program"
    if simulated_ is not None:
        solver += f", simulated ({simulated_:.1%} within the SLO)"
    return Plan(
        purchases,
        sized.usd_per_h,
        sized.bound_usd_per_h,
        solver,
        routing={
            bucket: {place[n]: share for n, share in shares.items()}
            for bucket, shares in sized.shares.items()
        },
        limits=_limits(sized, offered),
        sources=(problem.profile.source,),
        solved_s=time.monotonic() - began,
    )


def _limits(sized: Sized, offered: Sequence[Unit]) -> tuple[str, ...]:
    used: dict[str, int] = {}
    for count, unit in zip(sized.counts, offered, strict=True):
        used[unit.offer.name] = used.get(unit.offer.name, 0) + count * unit.machines
    full = any(unit.offer.quota == used[unit.offer.name] for unit in offered)
    return ("slo", "quota") if full else ("slo",)
