"""Price and risk in one objective: by simulation, against single kinds, and with risk left out."""

from dataclasses import replace

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate import AggregatePlanner
from autoscale.placement.demand import Bucket, Demand
from autoscale.placement.market import (
    ExpectedPrice,
    MarketPlanner,
    Risk,
    at_risk,
    expected_usd_per_h,
    losses_from_survival,
)
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import Problem
from tests.autoscale.placement.aggregates import Rates, Shelf
from tests.autoscale.placement.markets import (
    expected_machine_usd,
    random_market,
    simulated_usd_per_h,
    single_kind_usd,
)

ASKED = Bucket(100, 100)


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_best_single_kind(seed: int):
    problem, risk = random_market(np.random.default_rng(seed))
    plan = MarketPlanner(risk).plan(problem, deadline_s=20)
    single = min(single_kind_usd(problem, risk, s.kind) for s in problem.shapes)
    assert plan.gap == pytest.approx(0, abs=1e-6)
    assert expected_usd_per_h(plan) <= single + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_is_bills_and_risk_as_the_words_have_it(seed: int):
    problem, risk = random_market(np.random.default_rng(10 + seed))
    plan = MarketPlanner(risk).plan(problem, deadline_s=20)
    offers = {offer.name: offer for offer in problem.catalog.offers()}
    bills = sum(p.machines * offers[p.offer].usd_per_h for p in plan.purchases)
    whole = sum(
        p.machines * expected_machine_usd(offers[p.offer], p.shape.role, problem, risk)
        for p in plan.purchases
    )
    assert plan.usd_per_h == pytest.approx(bills)
    assert expected_usd_per_h(plan) == pytest.approx(whole)


def two_markets(losses_per_h: float) -> tuple[Problem, Risk]:
    """One machine is needed: 4 $/h on demand; 1 $/h on spot, 15 minutes to replace."""
    shape = ReplicaShape("k")
    offers = (
        Offer("od", "k", 1, "r", "z", "on_demand", 4.0),
        Offer("spot", "k", 1, "r", "z", "spot", 1.0, None, 800.0),
    )
    rates = Rates({(shape, ASKED): 1.0})
    problem = Problem(Demand({ASKED: 1.0}), Shelf(offers), rates, (shape,))
    return problem, Risk({"spot": losses_per_h}, {"mixed": 100.0})


def test_an_expected_price_is_what_a_simulated_machine_costs():
    problem, risk = two_markets(0.5)
    price = ExpectedPrice.of(problem, risk)
    spot = problem.catalog.offers()[1]
    seen = simulated_usd_per_h(np.random.default_rng(0), spot, "mixed", 4.0, risk, 40_000)
    assert price(spot, problem.shapes[0]) == pytest.approx(seen, rel=0.02)
    assert price(spot, problem.shapes[0]) == pytest.approx(1 + 0.5 * 0.25 * 4)


def test_spot_is_left_where_risk_eats_the_discount():
    """3 $/h are saved, 1 $ is lost with each machine: the market turns at 3 losses/h."""
    for losses, offer in ((2.9, "spot"), (3.1, "od")):
        problem, risk = two_markets(losses)
        plan = MarketPlanner(risk).plan(problem)
        assert [p.offer for p in plan.purchases] == [offer]
        assert len(at_risk(plan, problem)) == (offer == "spot")
    problem, risk = two_markets(3.1)
    blind = AggregatePlanner().plan(problem)  # sees the bill alone, and falls for spot
    assert [p.offer for p in blind.purchases] == ["spot"]


def test_blind_to_risk_costs_more():
    lost = 0
    for seed in range(8):
        problem, risk = random_market(np.random.default_rng(50 + seed))
        seeing = expected_usd_per_h(MarketPlanner(risk).plan(problem, deadline_s=20))
        blind = AggregatePlanner().plan(problem, deadline_s=20)
        offers = {offer.name: offer for offer in problem.catalog.offers()}
        whole = sum(
            p.machines * expected_machine_usd(offers[p.offer], p.shape.role, problem, risk)
            for p in blind.purchases
        )
        assert seeing <= whole + 1e-6
        lost += seeing < whole - 1e-3
    assert lost >= 2


def test_roles_apart_only_where_that_pays():
    """Prompts on what computes, tokens on what has bandwidth, unless hand-offs cost half."""
    shapes = [
        ReplicaShape(kind, role=role)
        for kind in ("compute", "bandwidth")
        for role in ("mixed", "prefill", "decode")
    ]
    rates = dict(zip(shapes, (0.1, 1.0, 0.11, 0.1, 0.11, 1.0), strict=True))
    offers = tuple(Offer(k, k, 1, "r", "z", "on_demand", 1.0) for k in ("compute", "bandwidth"))
    problem = Problem(
        Demand({ASKED: 10.0}),
        Shelf(offers),
        Rates({(shape, ASKED): rate for shape, rate in rates.items()}),
        shapes,
    )
    plan = MarketPlanner(Risk({})).plan(problem)
    bought = {(p.shape.kind, p.shape.role): p.machines for p in plan.purchases}
    assert bought == {("compute", "prefill"): 10, ("bandwidth", "decode"): 10}
    together = replace(problem, shapes=[shape for shape in shapes if shape.role == "mixed"])
    assert MarketPlanner(Risk({})).plan(together).usd_per_h == 100.0


def test_refusals():
    problem, _ = two_markets(1.0)
    with pytest.raises(ValueError, match="no rate for the spot offer spot"):
        MarketPlanner(Risk({})).plan(problem)
    with pytest.raises(ValueError, match="losses_per_h of x is -1"):
        Risk({"x": -1.0})
    alone = replace(problem, catalog=Shelf((problem.catalog.offers()[1],)))
    with pytest.raises(ValueError, match="no on-demand offer of 1 or more k"):
        MarketPlanner(Risk({"spot": 1.0})).plan(alone)
    assert losses_from_survival(1800, 0.5) == pytest.approx(2 * np.log(2))
    with pytest.raises(ValueError, match="survival is 0"):
        losses_from_survival(60, 0)
