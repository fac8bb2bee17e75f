"""Which machines, and which requests on which of them, at the least cost: Melange's problem.

Griggs et al., "Melange: Cost Efficient Large Language Model Serving by Exploiting GPU
Heterogeneity" (2024), with several shapes and offers per kind, quotas, and prefill and decode apart
where shapes of those roles are given. The program is `aggregate_model`, the search
`aggregate_search`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from autoscale.placement.aggregate_columns import Column, Price, bill, columns, demanded, instance
from autoscale.placement.aggregate_model import Instance, Solution
from autoscale.placement.aggregate_search import MOST_COUNTS, search
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import Plan, Purchase
from autoscale.placement.planner import InfeasibleError, Problem


@dataclass(frozen=True)
class AggregatePlanner:
    """slices: equal parts that a bucket's requests are cut into, each served by machines of one
    kind (by one of each role where those are apart); None: shares of any size, as a weighted router
    keeps them. most_counts: counts of machines listed before HiGHS takes over; 0: HiGHS alone."""

    slices: int | None = None
    most_counts: int = MOST_COUNTS
    name: str = "aggregate"

    def __post_init__(self) -> None:
        if self.slices is not None and self.slices < 1:
            raise ValueError(f"slices is {self.slices}; accepted is None or 1 and more")

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        return self.plan_at(problem, bill, deadline_s=deadline_s)

    def plan_at(self, problem: Problem, price: Price, *, deadline_s: float = 10.0) -> Plan:
        """With `price` instead of the offer's own for the objective, which the plan's cost and
        bound are in; what a purchase says is the bill."""
        started_s = time.monotonic()
        buckets = demanded(problem)
        if not buckets:
            return Plan((), 0.0, 0.0, self.name, sources=(problem.profile.source,))
        of = columns(problem, price)
        program = instance(problem, of, self.slices)
        solution = search(program, deadline_s=deadline_s, most_counts=self.most_counts)
        if solution is None:
            raise InfeasibleError(_quota_binds(problem, of))
        return _plan(problem, program, solution, of, time.monotonic() - started_s)


def _plan(
    problem: Problem,
    program: Instance,
    solution: Solution,
    of: Sequence[Column],
    solved_s: float,
) -> Plan:
    order = [
        (group, tier.column, solution.bought[tier.column])
        for group, of_group in enumerate(program.groups)
        for tier in of_group.tiers
        if solution.bought.get(tier.column)
    ]
    purchases = tuple(_purchase(of[column], units) for _, column, units in order)
    routing = {
        bucket: _shares(program, solution, at, order) for at, bucket in enumerate(demanded(problem))
    }
    return Plan(
        purchases,
        solution.usd_per_h,
        solution.bound_usd_per_h,
        f"aggregate, {solution.solver}",
        routing=routing,
        limits=_limits(of, [(of[column], units) for _, column, units in order]),
        sources=(problem.profile.source,),
        solved_s=solved_s,
    )


def _purchase(column: Column, units: int) -> Purchase:
    machines = units * column.machines
    usd = machines * column.offer.usd_per_h
    return Purchase(column.offer.name, machines, column.shape, units * column.replicas, usd)


def _shares(
    program: Instance, solution: Solution, bucket: int, order: Sequence[tuple[int, int, int]]
) -> dict[int, float]:
    """Of one bucket, by purchase: those of a group share its part by their units. Where roles are
    apart, mixed and prefill shares make 1 together, and so do mixed and decode shares."""
    of_group = dict.fromkeys(range(len(program.groups)), 0.0)
    for option, share in solution.assignment.shares[bucket].items():
        for group in program.options[option]:
            of_group[group] += share
    return {
        at: of_group[group] * units / int(solution.units[group])
        for at, (group, _, units) in enumerate(order)
        if of_group[group] > 0
    }


def _limits(of: Sequence[Column], bought: Sequence[tuple[Column, int]]) -> tuple[str, ...]:
    """What keeps the plan from being cheaper, as far as the program knows: an offer bought up to
    its quota, requests that some offers have no memory for, or cannot serve within the SLO."""
    limits = []
    if any(short for column in of for short in column.short_of_memory):
        limits.append("memory")
    if any(
        rate == 0 and not short
        for column in of
        for rate, short in zip(column.requests_per_s, column.short_of_memory, strict=True)
    ):
        limits.append("slo")
    if any(
        column.offer.quota is not None and (units + 1) * column.machines > column.offer.quota
        for column, units in bought
    ):
        limits.append("quota")
    return tuple(limits)


def _quota_binds(problem: Problem, of: Sequence[Column]) -> str:
    """By how much: the largest share of the demand, all buckets alike, that quotas allow."""
    rates = problem.demand.requests_per_s
    held = {column.offer.name: column.offer.quota for column in of}
    served = _largest_share(problem, of)
    quotas = ", ".join(f"{name} {quota}" for name, quota in sorted(held.items()))
    return (
        f"quota: at most {served:.0%} of {sum(rates.values()):g} requests/s can be served "
        f"within the quotas ({quotas}; None is no limit)"
    )


def _largest_share(problem: Problem, of: Sequence[Column]) -> float:
    """By halving, machines in whole numbers and shares of any size."""
    low, high = 0.0, 1.0
    for _ in range(10):
        share = (low + high) / 2
        asked = {Bucket(*b): rate * share for b, rate in problem.demand.requests_per_s.items()}
        if _carries(problem, of, asked):
            low = share
        else:
            high = share
    return low


def _carries(problem: Problem, of: Sequence[Column], asked: dict[Bucket, float]) -> bool:
    part = Problem(
        type(problem.demand)(asked, problem.demand.slo),
        problem.catalog,
        problem.profile,
        problem.shapes,
        at_s=problem.at_s,
    )
    return search(instance(part, of, None), deadline_s=1.0) is not None
