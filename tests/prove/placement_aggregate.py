"""Proof rows of the aggregate planner: the exhaustive optimum, the paper's own program in a
fraction of its time, and Melange's published costs over a throughput table inverted from its
figures."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate import AggregatePlanner
from autoscale.placement.aggregate_columns import columns, demanded
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
from tests.prove.melange_inverse import (
    KINDS,
    Inverse,
    corners,
    disagreeing,
    invert,
    published,
)
from tests.prove.row import Row

DATA = Path("../shared/data/melange")
INSTANCES = 200
PAPER_SLICES = 4
LEAST_RATIO = 5.0
ARENA_TOKENS = 1000


def rows(instances: int = INSTANCES) -> Iterator[Row]:
    """Every row of this module; about three minutes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    yield exhaustive(seed, instances)
    yield from paper(seed, instances)
    if not (DATA / "arena_120ms_costs.json").exists():
        yield Row("Melange Arena, 120 ms", "exact", "skipped, data absent", True)
        return
    yield from arena()


def outcome(planner: Planner, problem: Problem) -> float | None:
    """The cost; None where it says that there is no plan."""
    try:
        return planner.plan(problem, deadline_s=60).usd_per_h
    except InfeasibleError:
        return None


def exhaustive(seed: int, instances: int) -> Row:
    """Half of the problems with prefill and decode apart; with lists and with HiGHS alone."""
    rng = np.random.default_rng(seed)
    wrong = infeasible = 0
    for number in range(instances):
        problem = small_problem(rng, apart=number % 2 == 1)
        slices = int(rng.integers(1, 4))
        best = outcome(ExhaustivePlanner(slices), problem)
        infeasible += best is None
        for most_counts in (60_000, 0):
            found = outcome(AggregatePlanner(slices, most_counts), problem)
            same = found is None if best is None else found is not None and abs(found - best) < 1e-6
            wrong += not same
    measured = f"{wrong} differ, {infeasible} infeasible recognised (seed {seed})"
    return Row(
        f"aggregate = exhaustive optimum, {instances} random instances",
        "0 differ, some infeasible",
        measured,
        wrong == 0 and infeasible > 0,
    )


def paper(seed: int, instances: int) -> Iterator[Row]:
    """Both through HiGHS, in turns; times are of building and solving."""
    rng = np.random.default_rng(seed)
    times: list[tuple[float, float]] = []
    wrong = beaten = 0
    for _ in range(instances):
        problem = large_problem(rng)
        started_s = time.perf_counter()
        of = columns(problem)
        asked = [problem.demand.requests_per_s[bucket] for bucket in demanded(problem)]
        theirs = papers_cost(of, asked, PAPER_SLICES)
        between_s = time.perf_counter()
        ours = outcome(AggregatePlanner(PAPER_SLICES), problem)
        times.append((between_s - started_s, time.perf_counter() - between_s))
        same = ours is None if theirs is None else ours is not None and abs(ours - theirs) < 1e-4
        below = theirs is not None and ours is not None and ours < theirs and keeps(problem)
        wrong += not (same or below)
        beaten += below and not same
    check = f"aggregate against the paper's 0/1 program, {instances} random instances"
    measured = f"{wrong} differ, {beaten} where its solver stopped above a plan that keeps it"
    yield Row(f"{check}: cost", "0 differ", f"{measured} (seed {seed})", wrong == 0)
    theirs_s, ours_s = (statistics.median(each) for each in zip(*times, strict=True))
    ratio = theirs_s / ours_s
    measured = f"x {ratio:.1f} ({theirs_s * 1e3:.0f} ms / {ours_s * 1e3:.1f} ms, medians)"
    yield Row(f"{check}: time", f">= x {LEAST_RATIO:g}", measured, ratio >= LEAST_RATIO)


def keeps(problem: Problem) -> bool:
    """Whether the planner's plan is a solution of the paper's program: whole slices of each bucket,
    and no more load on a kind than machines. HiGHS once called a dearer one of it optimal."""
    plan = AggregatePlanner(PAPER_SLICES).plan(problem)
    loads = dict.fromkeys(range(len(plan.purchases)), 0.0)
    for bucket, shares in plan.routing.items():
        whole = [
            abs(share * PAPER_SLICES - round(share * PAPER_SLICES)) for share in shares.values()
        ]
        if max(whole) > 1e-9 or abs(sum(shares.values()) - 1) > 1e-9:
            return False
        asked = problem.demand.requests_per_s[bucket]
        for place, share in shares.items():
            shape = plan.purchases[place].shape
            rate = problem.profile.requests_per_s(shape, bucket, problem.demand.slo)
            loads[place] += asked * share / rate
    return all(load <= plan.purchases[place].replicas for place, load in loads.items())


def arena() -> Iterator[Row]:
    """The inverse profile, then what the planner makes of it."""
    prices, table = published(DATA / "arena_120ms_costs.json")
    grids = DATA / "fig_cost_efficiency_grids.json"
    found = invert(corners(grids, ARENA_TOKENS), prices, table)
    check = f"Melange Arena 120 ms: a table for all three rates, inputs <= {ARENA_TOKENS}"
    sizes = ", ".join(f"{i}/{o}" for i, o in found.loads())
    wrong = disagreeing(grids, found)
    measured = f"margin {found.margin:+.4f} of a machine, requests of {sizes}, {len(wrong)} off"
    good = abs(found.margin) > 1e-4 and not wrong
    yield Row(check, "found and as in the grids, or proved impossible", measured, good)
    usual = invert(corners(grids, 2000, h100_worst_at_least=True), prices, table)
    told = f"margin {usual.margin:+.4f}: " + ("found" if usual.margin > 0 else "proved impossible")
    yield Row("the same, inputs <= 2000, if H100 is worst at 25/25", "told", told, True)
    if found.margin <= 0:
        return
    for row in table:
        want = float(np.dot(prices, row.mix))
        plans = [
            AggregatePlanner(slices).plan(arena_problem(found, row.requests_per_s))
            for slices in (None, 8)
        ]
        alone = tuple(
            machines(AggregatePlanner(None).plan(arena_problem(found, row.requests_per_s, kind)))
            for kind in KINDS
        )
        costs = ", ".join(f"{plan.usd_per_h:.2f}" for plan in plans)
        yield Row(
            f"Melange Arena 120 ms at {row.requests_per_s:g} requests/s",
            f"$ {want:.2f}, alone {row.alone}",
            f"$ {costs} (any share, 8 slices), alone {alone}",
            abs(plans[0].usd_per_h - want) < 5e-3 and alone == row.alone,
        )


def machines(plan: Plan) -> int:
    return sum(purchase.machines for purchase in plan.purchases)


def arena_problem(found: Inverse, requests_per_s: float, kind: str | None = None) -> Problem:
    """Requests of the inverted mix, equally many of each size, on all kinds or on one."""
    loads = found.loads()
    shapes = [ReplicaShape(each) for each in KINDS if kind in (None, each)]
    rates = {
        (shape, Bucket(*size)): 1 / len(loads) / load[KINDS.index(shape.kind)]
        for shape in shapes
        for size, load in loads.items()
    }
    offers = [
        Offer(each, each, 1, "r", "z", "on_demand", float(price))
        for each, price in zip(KINDS, found.prices, strict=True)
    ]
    asked = {Bucket(*size): requests_per_s / len(loads) for size in loads}
    return Problem(Demand(asked), Shelf(tuple(offers)), Rates(rates), tuple(shapes))
