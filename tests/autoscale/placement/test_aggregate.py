"""The aggregate planner against exhaustive search, the paper's program and by-hand problems."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.placement import aggregate_milp, aggregate_search
from autoscale.placement.aggregate import AggregatePlanner
from autoscale.placement.aggregate_bounds import Proofs
from autoscale.placement.aggregate_columns import columns, demanded, filling
from autoscale.placement.aggregate_model import Floats, Instance, Integers
from autoscale.placement.demand import Bucket, Demand
from autoscale.placement.exhaustive import ExhaustivePlanner
from autoscale.placement.plan import Plan, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Planner, Problem
from tests.autoscale.placement.aggregates import (
    Rates,
    Shelf,
    large_problem,
    papers_cost,
    small_problem,
)

SHORT, LONG = Bucket(100, 50), Bucket(4000, 500)


def outcome(planner: Planner, problem: Problem) -> float | None:
    try:
        return planner.plan(problem, deadline_s=60).usd_per_h
    except InfeasibleError:
        return None


def overloads(plan: Plan, problem: Problem) -> list[str]:
    """Read off the plan alone: purchases that are given more than they can do, buckets that are not
    served once (by each role), quotas that are broken."""
    wrong = []
    used = [0.0] * len(plan.purchases)
    for bucket, shares in plan.routing.items():
        rate = problem.demand.requests_per_s[bucket]
        for first in ("prefill", "decode"):
            roles = ("mixed", first)
            total = sum(s for at, s in shares.items() if plan.purchases[at].shape.role in roles)
            if abs(total - 1) > 1e-6:
                wrong.append(f"{bucket} {first} {total}")
        for at, share in shares.items():
            shape = plan.purchases[at].shape
            each = problem.profile.requests_per_s(shape, bucket, problem.demand.slo)
            used[at] += rate * share / each if each else np.inf
    for purchase, load in zip(plan.purchases, used, strict=True):
        if load > purchase.replicas * (1 + 1e-5) + 1e-5:
            wrong.append(f"{purchase} {load}")
    held: dict[str, int] = {}
    for purchase in plan.purchases:
        held[purchase.offer] = held.get(purchase.offer, 0) + purchase.machines
    for offer in problem.catalog.offers():
        if offer.quota is not None and held.get(offer.name, 0) > offer.quota:
            wrong.append(f"{offer.name} {held[offer.name]}")
    if set(plan.routing) != {b for b, r in problem.demand.requests_per_s.items() if r > 0}:
        wrong.append("buckets")
    return wrong


@pytest.mark.parametrize("seed", range(24))
def test_equals_exhaustive_search(seed: int):
    rng = np.random.default_rng(seed)
    problem = small_problem(rng, apart=seed % 2 == 1)
    slices = int(rng.integers(1, 4))
    best = outcome(ExhaustivePlanner(slices), problem)
    for most_counts in (60_000, 0):
        found = outcome(AggregatePlanner(slices, most_counts), problem)
        assert (best is None) == (found is None)
        assert best is None or found == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("slices", [None, 2, 5])
def test_nobody_is_given_more_than_he_can_do(slices: int | None):
    planned = 0
    for seed in range(40):
        problem = small_problem(np.random.default_rng(seed), apart=seed % 2 == 0)
        try:
            plan = AggregatePlanner(slices).plan(problem)
        except InfeasibleError:
            continue
        planned += 1
        assert overloads(plan, problem) == []
        assert sum(p.usd_per_h for p in plan.purchases) == pytest.approx(plan.usd_per_h)
        assert plan.gap == pytest.approx(0, abs=1e-9)
    assert planned > 20


def test_a_share_too_much_is_noticed():
    """The check above, on a plan with one machine less."""
    problem = small_problem(np.random.default_rng(0))
    plan = AggregatePlanner().plan(problem)
    at = next(at for at, p in enumerate(plan.purchases) if p.machines)
    less = replace(plan.purchases[at], replicas=0)
    cut = replace(plan, purchases=(*plan.purchases[:at], less, *plan.purchases[at + 1 :]))
    assert overloads(plan, problem) == [] and overloads(cut, problem) != []


@pytest.mark.parametrize("seed", range(6))
def test_costs_what_the_papers_program_costs(seed: int):
    problem = large_problem(np.random.default_rng(seed))
    of, asked = columns(problem), [problem.demand.requests_per_s[b] for b in demanded(problem)]
    paper = papers_cost(of, asked, 4)
    assert outcome(AggregatePlanner(4), problem) == pytest.approx(paper, abs=1e-4)
    shared = outcome(AggregatePlanner(None), problem)
    assert shared is not None and paper is not None and shared <= paper + 1e-6


def test_bounds_keep_highs_out(monkeypatch: pytest.MonkeyPatch):
    """Most instances end without an integer program; without the proofs they do not."""
    calls: list[aggregate_milp.Found] = []
    solve = aggregate_milp.solve

    def counted(*given: Any, **named: Any) -> aggregate_milp.Found:
        calls.append(solve(*given, **named))
        return calls[-1]

    monkeypatch.setattr(aggregate_milp, "solve", counted)
    problems = [large_problem(np.random.default_rng(seed)) for seed in range(12)]
    costs = [outcome(AggregatePlanner(4), problem) for problem in problems]
    with_proofs = len(calls)

    def nothing(instance: Instance, units: Integers) -> tuple[Proofs, Floats]:
        none = Proofs(np.zeros((0, len(instance.groups))), np.zeros(0))
        return none, np.tile(instance.cheapest, (len(units), 1))

    monkeypatch.setattr(aggregate_search, "ascend", nothing)
    monkeypatch.setattr(
        aggregate_search, "refuted_by_slices", lambda i, u, w: np.zeros(len(u), dtype=bool)
    )
    calls.clear()
    again = [outcome(AggregatePlanner(4), problem) for problem in problems]
    assert again == pytest.approx(costs)
    assert with_proofs <= 12 and len(calls) >= 3 * max(1, with_proofs)


def by_hand(
    offers: list[Offer], rates: Mapping[str, tuple[float, float]], *shapes: ReplicaShape
) -> Problem:
    """Rates of SHORT and LONG by kind; 2 and 1 requests/s are asked."""
    shapes = shapes or tuple(ReplicaShape(kind) for kind in rates)
    table = {
        (shape, bucket): rate * shape.accelerators
        for shape in shapes
        for bucket, rate in zip((SHORT, LONG), rates[shape.kind], strict=True)
    }
    return Problem(Demand({SHORT: 2.0, LONG: 1.0}), Shelf(tuple(offers)), Rates(table), shapes)


def offer(kind: str, usd: float, count: int = 1, quota: int | None = None, name: str = "") -> Offer:
    return Offer(name or kind, kind, count, "r", "z", "on_demand", usd, quota)


def test_long_requests_go_where_they_are_cheap():
    """Short ones cost 1 $ on the small kind and 2 on the large, long ones 8 and 4."""
    problem = by_hand(
        [offer("small", 1.0), offer("large", 4.0)], {"small": (2, 0.125), "large": (4, 1)}
    )
    plan = AggregatePlanner().plan(problem)
    assert plan.usd_per_h == 5.0 == plan.bound_usd_per_h
    kinds = [purchase.shape.kind for purchase in plan.purchases]
    assert plan.routing[LONG] == {kinds.index("large"): 1.0}
    assert plan.routing[SHORT] == {kinds.index("small"): 1.0}


def test_the_cheap_offer_of_a_kind_is_taken_first_up_to_its_quota():
    offers = [offer("k", 3.0, name="dear"), offer("k", 1.0, quota=2, name="cheap")]
    plan = AggregatePlanner().plan(by_hand(offers, {"k": (1, 0.5)}))
    assert {p.offer: p.machines for p in plan.purchases} == {"cheap": 2, "dear": 2}
    assert (plan.usd_per_h, plan.limits) == (8.0, ("quota",))
    free = [replace(each, quota=None) for each in offers]
    assert AggregatePlanner().plan(by_hand(free, {"k": (1, 0.5)})).usd_per_h == 4.0


def test_shapes_on_one_offer_share_its_quota():
    """Wide replicas alone can take long requests; two machines are all there is."""
    narrow, wide = ReplicaShape("k", 1), ReplicaShape("k", 4)
    rates = {
        (narrow, SHORT): 0.6,
        (narrow, LONG): 0.0,
        (wide, SHORT): 2.0,
        (wide, LONG): 1.0,
    }
    for quota, want in ((2, 20.0), (1, None)):
        problem = Problem(
            Demand({SHORT: 2.0, LONG: 1.0}),
            Shelf((offer("k", 10.0, count=4, quota=quota),)),
            Rates(rates),
            (narrow, wide),
        )
        assert outcome(AggregatePlanner(), problem) == want
        assert outcome(ExhaustivePlanner(2), problem) == want


def test_how_shapes_lie_on_machines():
    four = offer("k", 1.0, count=4)
    assert filling(four, ReplicaShape("k", 2, 1)) == (1, 2)
    assert filling(four, ReplicaShape("k", 2, 4)) == (2, 1)
    assert filling(four, ReplicaShape("k", 4, 3)) == (3, 1)
    assert filling(four, ReplicaShape("k", 8, 1)) is None


def test_refusals_say_what_binds():
    shape = ReplicaShape("k")
    catalog = Shelf((offer("k", 1.0, quota=2),))
    demand = Demand({SHORT: 2.0})
    slow = Problem(demand, catalog, Rates({}), (shape,))
    with pytest.raises(InfeasibleError, match="slo: requests of 100 tokens in and 50 out"):
        AggregatePlanner().plan(slow)
    full = Problem(demand, catalog, Rates({(shape, SHORT): 9.0}, {shape: 149}), (shape,))
    with pytest.raises(InfeasibleError, match="memory: requests of 100 tokens in"):
        AggregatePlanner().plan(full)
    short = Problem(demand, catalog, Rates({(shape, SHORT): 0.5}), (shape,))
    with pytest.raises(InfeasibleError, match=r"quota: at most 50% of 2 requests/s.*k 2"):
        AggregatePlanner().plan(short)
    with pytest.raises(ValueError, match="slices is 0"):
        AggregatePlanner(0)
    wrong = Problem(Demand({SHORT: -1.0}), catalog, Rates({}), (shape,))
    with pytest.raises(ValueError, match="requests_per_s"):
        AggregatePlanner().plan(wrong)


def test_no_requests_cost_nothing():
    problem = by_hand([offer("k", 1.0)], {"k": (1, 1)})
    plan = AggregatePlanner().plan(replace(problem, demand=Demand({SHORT: 0.0})))
    assert (plan.purchases, plan.usd_per_h, plan.gap) == ((), 0.0, 0.0)


def test_a_short_deadline_still_gives_a_plan_and_a_bound():
    """Many kinds, so that listing counts is out: HiGHS is cut off."""
    rng = np.random.default_rng(3)
    buckets = [Bucket(100 * (n + 1), 50) for n in range(30)]
    shapes = tuple(ReplicaShape(f"k{n}") for n in range(10))
    rates = {(s, b): float(rng.uniform(0.2, 3.0)) for s in shapes for b in buckets}
    offers = [offer(shape.kind, float(rng.uniform(1, 5))) for shape in shapes]
    problem = Problem(
        Demand({b: float(rng.uniform(0.2, 1.0)) for b in buckets}),
        Shelf(tuple(offers)),
        Rates(rates),
        shapes,
    )
    hasty = AggregatePlanner(8).plan(problem, deadline_s=0.05)
    better = AggregatePlanner(8).plan(problem, deadline_s=5)
    assert overloads(hasty, problem) == [] == overloads(better, problem)
    assert hasty.bound_usd_per_h <= better.usd_per_h <= hasty.usd_per_h
    assert hasty.bound_usd_per_h > 0 and better.gap <= hasty.gap
