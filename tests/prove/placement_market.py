"""Proof rows of price and risk in one objective: on random catalogues with spot markets, quotas and
roles, never worse than one kind alone; the saving; and what an expected price is by simulation."""

import statistics
from collections.abc import Iterator

import numpy as np

from autoscale.placement.aggregate import AggregatePlanner
from autoscale.placement.market import ExpectedPrice, MarketPlanner, Risk, expected_usd_per_h
from autoscale.placement.plan import Plan
from autoscale.placement.planner import Problem
from tests.autoscale.placement.markets import (
    expected_machine_usd,
    random_market,
    simulated_usd_per_h,
    single_kind_usd,
)
from tests.prove.row import Row

CATALOGUES = 50
SIMULATED_LOSSES = 20_000


def rows(catalogues: int = CATALOGUES) -> Iterator[Row]:
    """Every row of this module; about two minutes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    savings, gaps, blind = [], [], []
    worse = 0
    for _ in range(catalogues):
        problem, risk = random_market(rng)
        plan = MarketPlanner(risk).plan(problem, deadline_s=20)
        usd = expected_usd_per_h(plan)
        single = min(single_kind_usd(problem, risk, kind) for kind in kinds(problem))
        worse += usd > single + 1e-6 or abs(usd - from_words(plan, problem, risk)) > 1e-6
        savings.append(100 * (1 - usd / single))
        gaps.append(plan.gap)
        seen = AggregatePlanner().plan(problem, deadline_s=20)
        blind.append(100 * (1 - usd / from_words(seen, problem, risk)))
    check = f"kinds, roles, markets and risk together, {catalogues} random catalogues"
    told = f"{worse} worse, largest gap {max(gaps):.2%} (seed {seed})"
    yield Row(f"{check}: against the best single kind", "0 worse", told, worse == 0)
    yield Row(f"{check}: saving", "told", spread(savings), True)
    yield Row(
        f"{check}: saving over a plan blind to risk", ">= 0 %", spread(blind), min(blind) > -1e-4
    )
    yield simulated(rng)


def kinds(problem: Problem) -> list[str]:
    return sorted({shape.kind for shape in problem.shapes})


def from_words(plan: Plan, problem: Problem, risk: Risk) -> float:
    """Expected $/h of a plan, from the definition."""
    offers = {offer.name: offer for offer in problem.catalog.offers()}
    return sum(
        each.machines * expected_machine_usd(offers[each.offer], each.shape.role, problem, risk)
        for each in plan.purchases
    )


def spread(percents: list[float]) -> str:
    tenths = statistics.quantiles(percents, n=10)
    return (
        f"least {min(percents):.1f}, tenth {tenths[0]:.1f}, median {tenths[4]:.1f}, "
        f"ninth {tenths[8]:.1f}, most {max(percents):.1f} %"
    )


def simulated(rng: np.random.Generator) -> Row:
    """Every spot offer of one catalogue, kept up for many hours."""
    problem, risk = random_market(rng)
    while not risk.losses_per_h:
        problem, risk = random_market(rng)
    price = ExpectedPrice.of(problem, risk)
    errors = []
    for offer in problem.catalog.offers():
        if offer.name in risk.losses_per_h:
            stand_in = price.stand_in_usd_per_h[offer.name]
            hours = SIMULATED_LOSSES / risk.losses_per_h[offer.name]
            seen = simulated_usd_per_h(rng, offer, "mixed", stand_in, risk, hours)
            shape = next(s for s in problem.shapes if s.kind == offer.kind and s.role == "mixed")
            errors.append(abs(price.risk_usd_per_h(offer, shape) / (seen - offer.usd_per_h) - 1))
    measured = f"{max(errors):.2%} at most, {len(errors)} offers"
    return Row("price of risk = simulated machine's", "within 3 %", measured, max(errors) < 0.03)
