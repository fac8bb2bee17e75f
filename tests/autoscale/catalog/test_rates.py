"""Rates within an SLO: what the formulas promise the simulation keeps, and much more it does not;
memory that profiles promise is there when it is counted again."""

import pytest

from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.model import ModelSize
from autoscale.catalog.rates import Replica, replica_rate
from autoscale.catalog.roofline import Roofline
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.feasible_memory import accelerator_bytes
from autoscale.placement.plan import Plan, Purchase, ReplicaShape, Role
from autoscale.placement.simulation import simulate

KINDS = read_kinds()
MODEL = ModelSize("small-8b", 32, 4096, 32, 8, 128, 14336, 128256)
ROOFLINE = Roofline(KINDS, MODEL)


def attained(shape: ReplicaShape, bucket: Bucket, slo: Slo, replicas: int, times: float) -> float:
    """Of `replicas` at `times` the rate that the formulas allow them."""
    rate = ROOFLINE.requests_per_s(shape, bucket, slo)
    plan = Plan((Purchase("o", 1, shape, replicas, 0),), 0, 0, "", routing={bucket: {0: 1.0}})
    demand = Demand({bucket: times * rate * replicas}, slo)
    return simulate(plan, demand, ROOFLINE, [ROOFLINE.kv_tokens(shape)], seed=7).attained


@pytest.mark.parametrize("kind", ["l4", "a100-80g"])
@pytest.mark.parametrize("bucket", [Bucket(128, 64), Bucket(1024, 128)])
@pytest.mark.parametrize("slo", [Slo(1.0, 0.1), Slo(0.5, 0.15)])
def test_the_simulation_keeps_what_the_formulas_promise(kind: str, bucket: Bucket, slo: Slo):
    shape = ReplicaShape(kind)
    assert attained(shape, bucket, slo, 3, 1.0) >= slo.attained
    assert attained(shape, bucket, slo, 1, 1.0) >= slo.attained - 0.03


@pytest.mark.parametrize("bucket", [Bucket(128, 64), Bucket(1024, 128)])
def test_the_formulas_are_not_timid(bucket: Bucket):
    """At 2.5 times the rate the SLO is lost, so no more than that is left on the table."""
    assert attained(ReplicaShape("a100-80g"), bucket, Slo(0.6, 0.06), 3, 2.5) < 0.9


def rate(role: Role, slo: Slo, kv_tokens: int = 10**6) -> float:
    """Prompts of 100 tokens take 0.1 s; a decode step 10 ms and 1 ms for each sequence."""

    def step_s(prefill: float, sequences: float, context: float) -> float:
        return prefill / 1000 + (0.01 + sequences / 1000 if sequences else 0)

    return replica_rate(Replica(step_s, kv_tokens, role), Bucket(100, 50), slo)


def test_limits_that_cannot_be_kept_give_no_rate():
    assert rate("mixed", Slo(ttft_s=0.05)) == 0
    assert rate("mixed", Slo(tpot_s=0.005)) == 0
    assert rate("prefill", Slo(ttft_s=0.05)) == 0 < rate("decode", Slo(ttft_s=0.05))
    assert rate("decode", Slo(tpot_s=0.005)) == 0 < rate("prefill", Slo(tpot_s=0.005))
    assert rate("mixed", Slo(), kv_tokens=149) == 0 < rate("mixed", Slo(), kv_tokens=400)


def test_a_wider_limit_never_gives_a_lower_rate():
    for role in ("mixed", "prefill", "decode"):
        by_first = [rate(role, Slo(ttft_s=0.12 * 2**n, tpot_s=0.05)) for n in range(6)]
        by_gap = [rate(role, Slo(ttft_s=1.0, tpot_s=0.012 * 1.5**n)) for n in range(6)]
        by_room = [rate(role, Slo(1.0, 0.05), kv_tokens=200 * 2**n) for n in range(6)]
        by_share = [rate(role, Slo(0.3, 0.05, attained)) for attained in (0.99, 0.9, 0.5)]
        for rates in (by_first, by_gap, by_room, by_share):
            assert rates == sorted(rates) and rates[-1] > 0


def test_prefill_alone_is_an_md1_queue():
    """At the rate that is promised, Lindley's recursion keeps the limit, within the safety."""
    import random

    slo = Slo(ttft_s=0.3, attained=0.9)
    per_s, chance = rate("prefill", slo), random.Random(5)
    free_s, kept, now_s = 0.0, 0, 0.0
    for _ in range(50_000):
        now_s += chance.expovariate(per_s)
        free_s = max(free_s, now_s) + 0.1
        kept += free_s - now_s <= slo.ttft_s  # type: ignore[operator]
    assert 0.9 <= kept / 50_000 <= 0.99


@pytest.mark.parametrize(
    "shape",
    [
        ReplicaShape("l4"),
        ReplicaShape("a100-80g", tensor=2),
        ReplicaShape("h100", tensor=4, pipeline=3, weight_bits=8),
        ReplicaShape("t4", weight_bits=4),
    ],
)
def test_room_that_is_promised_is_there(shape: ReplicaShape):
    """Counted again by the checker's own sum: it fits, and little is left over."""
    room, memory = MemoryRoom(KINDS, MODEL).kv_tokens(shape), KINDS[shape.kind].memory_bytes

    def fullest(tokens: int) -> float:
        stages = range(shape.pipeline)
        return max(accelerator_bytes(shape, MODEL, stage, tokens) for stage in stages)

    assert room > 0 and 0.8 * memory < fullest(room) <= memory


def test_no_room_where_weights_do_not_fit():
    assert MemoryRoom(KINDS, MODEL).kv_tokens(ReplicaShape("t4")) == 0
    assert MemoryRoom(KINDS, MODEL).kv_tokens(ReplicaShape("moon")) == 0
    assert MemoryRoom(KINDS, MODEL).kv_tokens(ReplicaShape("h100", pipeline=33)) == 0
    assert ROOFLINE.requests_per_s(ReplicaShape("t4"), Bucket(1, 1), Slo()) == 0
