"""Pools against every size of them, and against the simulation."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.pools import PoolsPlanner
from autoscale.placement.pools_simulation import saturated_per_s, simulated
from tests.autoscale.placement import pools_oracle

SEED = int(np.random.SeedSequence().generate_state(1)[0])


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_pools_are_the_cheapest_of_all(seed: int):
    problem = pools_oracle.random_problem(np.random.default_rng(seed))
    wanted = pools_oracle.cheapest(problem)
    if wanted == float("inf"):
        with pytest.raises(InfeasibleError):
            PoolsPlanner().plan(problem)
        return
    plan = PoolsPlanner().plan(problem)
    assert plan.usd_per_h == pytest.approx(wanted)
    assert plan.bound_usd_per_h <= wanted + 1e-6
    for bucket, shares in plan.routing.items():
        for phase in ("prefill", "decode"):
            of_phase = [
                share
                for n, share in shares.items()
                if plan.purchases[n].shape.role in ("mixed", phase)
            ]
            assert sum(of_phase) == pytest.approx(1.0), bucket


@dataclass
class Steps(pools_oracle.Table):
    """A table, and times of steps: 20 ms and 0.1 ms a prompt token; 15 ms and 0.2 ms a sequence."""

    def step_s(
        self, shape: ReplicaShape, prefill_tokens: float, sequences: float, context: float
    ) -> float:
        prompt = 0.02 + 1e-4 * prefill_tokens if prefill_tokens else 0.0
        return prompt + (0.015 + 2e-4 * sequences if sequences else 0.0)


BUCKET = Bucket(400, 100)


def stepwise(claimed: float, per_s: float = 20.0, quota: int = 50) -> Problem:
    """Prefill and decode shapes whose table claims so many requests per second."""
    shapes = [ReplicaShape("k", role="prefill"), ReplicaShape("k", role="decode")]
    offer = Offer("o", "k", 1, "r", "z", "on_demand", 2.0, quota)
    table = {(shape, BUCKET): claimed for shape in shapes}
    demand = Demand({BUCKET: per_s}, Slo(ttft_s=0.3, tpot_s=0.03, attained=0.9))
    return Problem(demand, pools_oracle.Shop((offer,)), Steps(table), shapes)


@pytest.mark.parametrize("claimed", [3.0, 8.0, 40.0])
def test_what_the_table_claims_is_put_right_by_the_simulation(claimed: float):
    """A prompt takes 60 ms: a table of 40 requests per second promises too much, one of 3
    wastes."""
    problem = stepwise(claimed)
    plan = PoolsPlanner(beyond_profile=claimed == 3.0).plan(problem)
    assert simulated(plan, problem) >= 0.9
    by_table = PoolsPlanner().plan(replace(problem, profile=without_steps(problem)))
    if claimed == 3.0:
        assert plan.usd_per_h < by_table.usd_per_h
    if claimed == 40.0:
        assert simulated(by_table, problem) < 0.9 and plan.usd_per_h > by_table.usd_per_h
    assert plan.bound_usd_per_h <= plan.usd_per_h


def test_a_profile_is_not_exceeded_unasked():
    within, beyond = PoolsPlanner().plan(stepwise(3.0)), PoolsPlanner(beyond_profile=True)
    assert within.usd_per_h == 2 * 2 * 7  # seven of each serve 20 requests/s at 3 each
    assert beyond.plan(stepwise(3.0)).usd_per_h < within.usd_per_h
    assert within.gap == 0.0


def without_steps(problem: Problem) -> pools_oracle.Table:
    assert isinstance(problem.profile, Steps)
    return pools_oracle.Table(problem.profile.per_s)


def test_an_slo_that_no_pool_keeps_is_infeasible():
    problem = stepwise(8.0)
    strict = replace(problem, demand=Demand({BUCKET: 20.0}, Slo(ttft_s=0.05, tpot_s=0.03)))
    with pytest.raises(InfeasibleError, match="SLO: in the simulation 0.0% keep it where 90.0%"):
        PoolsPlanner().plan(strict)


def test_what_no_shape_serves_is_named():
    problem = stepwise(8.0)
    with pytest.raises(InfeasibleError, match=r"no shape on offer serves the decode"):
        PoolsPlanner().plan(replace(problem, shapes=problem.shapes[:1]))
    with pytest.raises(InfeasibleError, match="quota"):
        PoolsPlanner().plan(stepwise(8.0, quota=2))


def test_saturation_by_hand():
    """Prompts of 400 in the largest batch: 40 ms each and 20 ms / 4096; 20 sequences of 99
    passes."""
    steps = Steps({})
    prompts = saturated_per_s(steps, 10_000, ReplicaShape("k", role="prefill"), BUCKET)
    assert prompts == pytest.approx(1 / (0.04 + 0.02 / 4096))
    answers = saturated_per_s(steps, 10_000, ReplicaShape("k", role="decode"), BUCKET)
    assert answers == pytest.approx(20 / (99 * (0.015 + 20 * 2e-4)))
    assert saturated_per_s(steps, 499, ReplicaShape("k"), BUCKET) == 0.0
