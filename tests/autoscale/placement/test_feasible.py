"""The feasibility checker: true plans pass, each kind of broken plan is noticed under its name, and
memory is counted as a matrix-by-matrix sum says."""

import random
from dataclasses import replace

import pytest

from autoscale.catalog.catalog import PricedCatalog
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.offer import Offer
from autoscale.catalog.roofline import Roofline
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.feasible import check, machines_for
from autoscale.placement.feasible_memory import accelerator_bytes
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from tests.autoscale.placement.mutations import MUTATIONS
from tests.autoscale.placement.small import MODEL, Every, problem, random_problem

PROBLEM = problem()
PLAN = Every().plan(PROBLEM)


def test_a_true_plan_has_no_fault_and_is_simulated():
    verdict = check(PLAN, PROBLEM)
    assert verdict.feasible and not verdict.unchecked
    assert verdict.outcome is not None and verdict.outcome.attained >= 0.88


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_plan_is_noticed(name: str):
    mutate, subjects = MUTATIONS[name]
    verdict = check(*mutate(PLAN, PROBLEM))
    assert subjects & {fault.subject for fault in verdict.faults}, verdict


def test_plans_of_random_problems_pass_and_their_mutations_do_not():
    chance, planned = random.Random(20), 0
    for _ in range(12):
        asked = random_problem(chance)
        try:
            plan = Every().plan(asked)
        except InfeasibleError:
            continue
        planned += 1
        assert check(plan, asked).faults == ()
        mutate, subjects = MUTATIONS[chance.choice(list(MUTATIONS))]
        assert subjects & {fault.subject for fault in check(*mutate(plan, asked)).faults}
    assert planned >= 4


def test_the_sentence_has_the_numbers():
    mutate, _ = MUTATIONS["exceed the quota"]
    faults = [f.what for f in check(*mutate(PLAN, PROBLEM)).faults if f.subject == "quota"]
    held = PLAN.purchases[0].machines
    assert faults == [f"{held} of {PLAN.purchases[0].offer}, the quota is {held - 1}"]


@pytest.mark.parametrize(
    ("count", "tensor", "pipeline", "replicas", "machines"),
    [(8, 2, 1, 4, 1), (8, 2, 1, 5, 2), (8, 3, 1, 3, 2), (8, 8, 2, 3, 6), (4, 4, 3, 1, 3)],
)
def test_machines_that_replicas_need(count, tensor, pipeline, replicas, machines):
    """Counted by hand: whole replicas to a machine, or whole machines to a replica."""
    offer = Offer("o", "h100", count, "r", "z", "on_demand", 1.0)
    purchase = Purchase("o", machines, ReplicaShape("h100", tensor, pipeline), replicas, 0.0)
    assert machines_for(purchase, offer) == machines


def test_memory_is_the_sum_of_all_matrices():
    """One stage of 32 layers on two accelerators, against matrices written out."""
    shape = ReplicaShape("h100", tensor=2, weight_bits=8)
    hidden, half_heads, half_keys, inner, vocab = 4096, 16 * 128, 4 * 128, 14336 // 2, 128256
    layer = hidden * (half_heads + half_keys + half_keys) + half_heads * hidden
    layer += 3 * hidden * inner
    weights = 32 * layer * 1 + 2 * (vocab // 2) * hidden * 2
    keys = 1000 * 32 * 2 * half_keys * 2
    activations = 512 * 2 * (2 * hidden + inner)
    assert accelerator_bytes(shape, MODEL, 0, 1000) == weights + keys + activations


def test_heads_that_cannot_be_shared_are_a_fault():
    shape = ReplicaShape("l4", tensor=3)
    kinds = read_kinds()
    offers = (Offer("l4x3", "l4", 3, "r", "z", "on_demand", 1.0),)
    asked = Problem(
        Demand({Bucket(64, 16): 0.1}, Slo(5, 1)),
        PricedCatalog(kinds, offers),
        Roofline(kinds, MODEL),
        [shape],
        model=MODEL,
    )
    plan = Plan(
        (Purchase("l4x3", 1, shape, 1, 1.0),), 1.0, 1.0, "", routing={Bucket(64, 16): {0: 1}}
    )
    faults = check(plan, asked).faults
    assert [fault.subject for fault in faults] == ["memory"] and "32 heads" in faults[0].what


def test_prefill_and_decode_apart_are_each_routed_in_full():
    """Two roles of one kind; each bucket goes wholly through both, by way of the network."""
    bucket = Bucket(512, 64)
    kinds = read_kinds()
    offers = (Offer("a100", "a100-80g", 1, "r", "z", "on_demand", 3.0),)
    roles = [ReplicaShape("a100-80g", role="prefill"), ReplicaShape("a100-80g", role="decode")]
    asked = Problem(
        Demand({bucket: 4.0}, Slo(1.0, 0.1)),
        PricedCatalog(kinds, offers),
        Roofline(kinds, MODEL),
        roles,
        model=MODEL,
    )
    purchases = tuple(Purchase("a100", 1, shape, 1, 3.0) for shape in roles)
    plan = Plan(purchases, 6.0, 0.0, "", routing={bucket: {0: 1.0, 1: 1.0}})
    verdict = check(plan, asked)
    assert verdict.faults == () and verdict.outcome is not None
    half = replace(plan, routing={bucket: {0: 1.0, 1: 0.5}})
    assert [fault.subject for fault in check(half, asked).faults] == ["routing"]
    slow = replace(
        asked, catalog=PricedCatalog(kinds, (replace(offers[0], network_gb_per_s=0.001),))
    )
    assert "slo" in {fault.subject for fault in check(plan, slow).faults}
