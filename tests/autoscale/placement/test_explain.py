"""Explanations are found by planning again, and are what an exhaustive planner says they are."""

from dataclasses import replace

import pytest

from autoscale.catalog.profile import LayerTimes
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.explain import (
    Asker,
    alternatives,
    binding,
    break_even_usd_per_h,
    choices,
    more_demand,
)
from autoscale.placement.plan import Plan, Purchase, ReplicaShape, Role
from autoscale.placement.planner import InfeasibleError, Problem
from tests.autoscale.placement.small import OFFERS, Every, problem

PROBLEM = problem()
PLAN = Every().plan(PROBLEM)
ASKER = Asker(Every(), PROBLEM, 10.0)


def cost_without(name: str) -> float:
    try:
        offers = tuple(offer for offer in OFFERS if offer.name != name)
        return Every().plan(problem(offers=offers)).usd_per_h
    except InfeasibleError:
        return float("inf")


def test_alternatives_are_other_plans_by_cost():
    found = alternatives(ASKER, PLAN)
    costs = [each.usd_per_h for each in found]
    assert costs == sorted(costs) and costs[0] >= PLAN.usd_per_h
    for each in found:
        if each.what.startswith("without "):
            assert each.usd_per_h == pytest.approx(cost_without(each.what.removeprefix("without ")))
        if each.plan:
            assert each.plan.purchases != PLAN.purchases


def test_the_other_way_of_roles_is_tried_where_it_was_asked_for():
    """A planner of fixed prices: apart costs 3, together 5; it is asked for the one not chosen."""

    class ByRole:
        name = "by role"

        def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
            roles = {shape.role for shape in problem.shapes}
            cost = 3.0 if "decode" in roles else 5.0
            chosen: tuple[Role, ...] = ("prefill", "decode") if "decode" in roles else ("mixed",)
            bought = tuple(Purchase("l4", 1, ReplicaShape("l4", role=r), 1, cost) for r in chosen)
            return Plan(bought, cost, cost, self.name)

    roles: tuple[Role, ...] = ("mixed", "prefill", "decode")
    asked = replace(PROBLEM, shapes=[ReplicaShape("l4", role=role) for role in roles])
    found = alternatives(Asker(ByRole(), asked, 10.0), ByRole().plan(asked))
    assert ("prefill and decode together", 5.0) in {(each.what, each.usd_per_h) for each in found}
    one_way = replace(asked, shapes=asked.shapes[1:])
    found = alternatives(Asker(ByRole(), one_way, 10.0), ByRole().plan(one_way))
    assert not [each for each in found if "prefill" in each.what]


def test_a_price_just_below_the_break_even_is_taken_and_just_above_is_not():
    idle = next(o for o in OFFERS if o.name not in {p.offer for p in PLAN.purchases})
    price = break_even_usd_per_h(ASKER, idle)
    assert price is not None and 0 < price < idle.usd_per_h

    def bought_at(usd_per_h: float) -> bool:
        offers = tuple(replace(o, usd_per_h=usd_per_h) if o is idle else o for o in OFFERS)
        return idle.name in {p.offer for p in Every().plan(problem(offers=offers)).purchases}

    assert bought_at(price) and not bought_at(price + 0.01 * idle.usd_per_h)


def test_an_offer_that_can_serve_nothing_is_no_gift():
    useless = replace(OFFERS[0], name="t4", kind="t4", usd_per_h=0.5)
    asked = problem(offers=(*OFFERS, useless))
    assert break_even_usd_per_h(Asker(Every(), asked, 10.0), useless) is None


def test_a_quota_that_binds_is_named_and_one_that_does_not_is_not():
    """With one l4 too few the next dearer plan is bought; one more of it saves that."""
    loose = problem(offers=tuple(replace(offer, quota=None) for offer in OFFERS))
    free = Every().plan(loose)
    name, held = free.purchases[0].offer, free.purchases[0].machines
    tight = problem(
        offers=tuple(replace(o, quota=held - 1 if o.name == name else None) for o in OFFERS)
    )
    plan = Every().plan(tight)
    found = binding(Asker(Every(), tight, 10.0), plan)
    quotas = [each for each in found if each.limit == "quota"]
    if held - 1 > 0:
        assert [each.changed for each in quotas] == [f"{held} of {name} instead of {held - 1}"]
        assert free.usd_per_h < plan.usd_per_h
        assert quotas[0].usd_per_h == pytest.approx(free.usd_per_h)
    assert not [b for b in binding(Asker(Every(), loose, 10.0), free) if b.limit == "quota"]


def test_an_slo_that_binds_is_named():
    """Where 1.25 times the gap lets cheaper machines in, it binds; where limits are wide, none."""
    rates = {Bucket(512, 128): 3.0}
    tight = problem(rates, Slo(ttft_s=3.0, tpot_s=0.075))
    found = binding(Asker(Every(), tight, 10.0), Every().plan(tight))
    cheaper = Every().plan(problem(rates, Slo(ttft_s=3.0, tpot_s=1.25 * 0.075)))
    assert {b.limit: b.usd_per_h for b in found}["slo, gap of tokens"] == cheaper.usd_per_h
    wide = problem({Bucket(128, 64): 0.5}, Slo(ttft_s=50, tpot_s=5))
    assert binding(Asker(Every(), wide, 10.0), Every().plan(wide)) == []


def test_without_a_plan_the_ways_out_are_told():
    rates = {Bucket(128, 64): 0.2}
    asked = problem(rates, Slo(ttft_s=1.5, tpot_s=0.0125))
    with pytest.raises(InfeasibleError):
        Every().plan(asked)
    ways = binding(Asker(Every(), asked, 10.0), None)
    wider = Every().plan(problem(rates, Slo(ttft_s=1.5, tpot_s=1.25 * 0.0125)))
    assert [(way.limit, way.usd_per_h) for way in ways] == [("slo, gap of tokens", wider.usd_per_h)]
    assert not binding(Asker(Every(), problem(slo=Slo(ttft_s=0.001)), 10.0), None)


def test_memory_that_binds_is_named():
    """Long requests fill the memory: a quarter more room is worth something."""
    long = problem({Bucket(4096, 1024): 0.5}, Slo(ttft_s=30, tpot_s=1))
    found = binding(Asker(Every(), long, 10.0), Every().plan(long))
    assert "memory" in {each.limit for each in found}


def test_a_planner_of_layers_finds_them_in_the_widened_profile():
    """One that refuses profiles without times of layers is asked about memory all the same."""
    seen: list[str] = []

    class OfLayers(Every):
        def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
            assert isinstance(problem.profile, LayerTimes), problem.profile
            seen.append(f"{problem.profile.source} {problem.profile.layer_s('l4', 'decode', 8)}")
            return super().plan(problem, deadline_s=deadline_s)

    binding(Asker(OfLayers(), PROBLEM, 10.0), PLAN)
    assert isinstance(PROBLEM.profile, LayerTimes)
    layer_s = PROBLEM.profile.layer_s("l4", "decode", 8)
    assert f"{PROBLEM.profile.source}, with room x 1.25 {layer_s}" in seen


def test_more_demand_never_costs_less():
    assert more_demand(ASKER).usd_per_h >= PLAN.usd_per_h


def test_choices_are_ordered_by_what_a_request_costs():
    bucket = Bucket(128, 64)
    found = choices(PROBLEM, PLAN, bucket)
    for choice in found:
        offer = next(o for o in OFFERS if o.name == choice.offer)
        rate = PROBLEM.profile.requests_per_s(choice.shape, bucket, PROBLEM.demand.slo)
        assert choice.usd_per_1000 == pytest.approx(1000 * offer.usd_per_h / 3600 / rate)
    assert [c.usd_per_1000 for c in found] == sorted(c.usd_per_1000 for c in found)
    assert sum(choice.share for choice in found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("bucket", "slo", "words"),
    [
        (Bucket(100_000, 100), Slo(5, 0.1), "memory: room for"),
        (Bucket(128, 64), Slo(ttft_s=0.01), "slo: first token"),
        (Bucket(128, 64), Slo(tpot_s=0.01), "slo: gap of tokens"),
        (Bucket(128, 64), Slo(0.01, 0.01), "slo: first token and gap of tokens"),
    ],
)
def test_why_not_is_said(bucket: Bucket, slo: Slo, words: str):
    asked: Problem = problem({bucket: 1.0}, slo)
    l4 = next(c for c in choices(asked, PLAN, bucket) if c.offer == "l4")
    assert l4.requests_per_s == 0 and words in l4.why
