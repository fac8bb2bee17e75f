"""The simulation against what queueing theory says exactly, and against itself undisturbed."""

import pytest

from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import Plan, Purchase, ReplicaShape, Role
from autoscale.placement.simulation import BUDGET_TOKENS, _Turns, simulate

STEP_S = 0.1


class Steps:
    """Every prompt of the budget takes STEP_S, and every decode step a tenth of that."""

    def step_s(self, shape, prefill_tokens, decode_sequences, context_tokens):
        decode_s = STEP_S / 10 if decode_sequences else 0.0
        return STEP_S * prefill_tokens / BUDGET_TOKENS + decode_s


def fleet(*roles: Role, replicas: int = 1) -> Plan:
    bucket = Bucket(BUDGET_TOKENS, 1)
    purchases = tuple(Purchase("o", 1, ReplicaShape("k", role=r), replicas, 0.0) for r in roles)
    return Plan(purchases, 0, 0, "", routing={bucket: {at: 1.0 for at in range(len(roles))}})


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_one_prompt_a_step_is_an_md1_queue(busy: float):
    """Mean time to the first token = D + busy D / (2 (1 - busy)), Pollaczek and Khinchine."""
    rate = busy / STEP_S
    demand = Demand({Bucket(BUDGET_TOKENS, 1): rate}, Slo(ttft_s=1e9))
    firsts = []
    for seed in range(3):
        arriving = _measured(demand, seed)
        firsts += arriving
    mean_s = sum(firsts) / len(firsts)
    assert mean_s == pytest.approx(STEP_S + busy * STEP_S / (2 * (1 - busy)), rel=0.05)


def _measured(demand: Demand, seed: int) -> list[float]:
    """Times to the first token of 20,000 requests, warmed up."""
    import random

    from autoscale.placement.simulation import Fleet, _arrivals, _servers

    plan = fleet("mixed")
    servers = [_servers(plan.purchases[0], Steps(), 10**9)]
    arriving = _arrivals(demand, 20_000, random.Random(seed))
    Fleet(plan, servers, lambda tokens: 0.0).run(arriving)
    return [request.ttft_s for request in arriving[2_000:]]


def test_a_lone_request_takes_its_own_steps():
    bucket = Bucket(BUDGET_TOKENS, 11)
    plan = fleet("mixed")
    plan = Plan(plan.purchases, 0, 0, "", routing={bucket: {0: 1.0}})
    outcome = simulate(plan, Demand({bucket: 1e-4}, Slo(1, 1)), Steps(), [10**9], requests=40)
    assert outcome.ttft_s == pytest.approx(STEP_S)
    assert outcome.tpot_s == pytest.approx(STEP_S / 10)
    assert outcome.attained == 1.0


def test_a_hand_off_delays_the_second_token_alone():
    bucket = Bucket(BUDGET_TOKENS, 11)
    plan = fleet("prefill", "decode")
    plan = Plan(plan.purchases, 0, 0, "", routing={bucket: {0: 1.0, 1: 1.0}})
    demand = Demand({bucket: 1e-4}, Slo(1, 1))
    outcome = simulate(
        plan, demand, Steps(), [10**9, 10**9], handoff_s=lambda tokens: 0.5, requests=40
    )
    assert outcome.ttft_s == pytest.approx(STEP_S)
    assert outcome.tpot_s == pytest.approx(STEP_S / 10 + 0.5 / 10)


def test_what_fits_nowhere_never_ends():
    plan = fleet("mixed")
    demand = Demand({Bucket(BUDGET_TOKENS, 1): 1.0}, Slo(1, 1))
    outcome = simulate(plan, demand, Steps(), [BUDGET_TOKENS], requests=40)
    assert outcome.attained == 0.0 and outcome.ttft_s == float("inf")


def test_little_room_makes_requests_wait():
    """With room for two sequences at a time instead of any number, the same load is late."""
    bucket = Bucket(64, 50)
    plan = fleet("mixed")
    plan = Plan(plan.purchases, 0, 0, "", routing={bucket: {0: 1.0}})
    demand = Demand({bucket: 5.0}, Slo(ttft_s=0.2, tpot_s=1))
    assert simulate(plan, demand, Steps(), [10**9]).attained > 0.9
    assert simulate(plan, demand, Steps(), [2 * 114]).attained < 0.2


@pytest.mark.parametrize("shares", [{0: 0.5, 1: 0.5}, {0: 0.7, 1: 0.2, 2: 0.1}, {3: 1.0}])
def test_turns_are_never_off_by_more_than_one(shares: dict[int, float]):
    turns, given = _Turns(shares), dict.fromkeys(shares, 0)
    for count in range(1, 1001):
        given[turns.next()] += 1
        for place, share in shares.items():
            assert abs(given[place] - share * count) <= 1
