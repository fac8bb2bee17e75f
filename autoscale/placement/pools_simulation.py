"""A plan's pools under Poisson arrivals, and what a replica serves at most, from times of steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoscale.catalog.profile import StepTimes
from autoscale.placement.demand import Bucket
from autoscale.placement.flow_routing import InterleavedRoundRobin
from autoscale.placement.goodput import (
    Arrival,
    Replica,
    Served,
    attained,
    colocated,
    disaggregated,
    poisson,
)
from autoscale.placement.plan import Plan, ReplicaShape
from autoscale.placement.planner import Problem, ThroughputProfile

REQUESTS = 1200
BATCHES = tuple(2**n for n in range(13))


@dataclass(frozen=True)
class ShapeTimes:
    """Times of one shape's steps as `goodput` asks for them."""

    steps: StepTimes
    shape: ReplicaShape

    def prompt_s(self, lengths: Sequence[int]) -> float:
        return self.steps.step_s(self.shape, float(sum(lengths)), 0.0, 0.0)

    def decode_s(self, sequences: float, context_tokens: float) -> float:
        each = context_tokens / sequences if sequences else 0.0
        return self.steps.step_s(self.shape, 0.0, sequences, each)


def saturated_per_s(steps: StepTimes, kv_tokens: int, shape: ReplicaShape, bucket: Bucket) -> float:
    """Requests per second beyond which a replica falls behind, whatever the SLO: prompts in the
    batch that is best for throughput, answers with all sequences that fit."""
    times, whole = ShapeTimes(steps, shape), bucket.input_tokens + bucket.output_tokens
    prompt_s = min(times.prompt_s([bucket.input_tokens] * n) / n for n in BATCHES)
    most = kv_tokens // whole
    if most < 1:
        return 0.0
    context = bucket.input_tokens  # at the least, so that this stays an upper limit
    batches = [n for n in BATCHES if n < most] + [most]
    pass_s = min(times.decode_s(n, n * context) / n for n in batches)
    answer_s = (bucket.output_tokens - 1) * pass_s
    busy_s = {"prefill": prompt_s, "decode": answer_s}.get(shape.role, prompt_s + answer_s)
    return 1.0 / busy_s if busy_s > 0 else float("inf")


def simulated(plan: Plan, problem: Problem, *, seed: int = 0, requests: int = REQUESTS) -> float:
    """The share of requests that keep the SLO on a plan's pools: those of mixed replicas apart from
    those of prefill and decode pools, as the plan routes them."""
    arrivals = _arrivals(problem, seed, requests)
    together, apart = _split(plan, arrivals)
    served: list[Served] = []
    pools = {
        role: _replicas(plan, problem.profile, role) for role in ("mixed", "prefill", "decode")
    }
    if together:
        served += colocated(together, pools["mixed"])
    if apart:
        served += disaggregated(apart, pools["prefill"], pools["decode"])
    return attained(served, problem.demand.slo)


def _arrivals(problem: Problem, seed: int, requests: int) -> list[Arrival]:
    demand = problem.demand
    buckets = list(demand.requests_per_s)
    weights = np.array([demand.requests_per_s[bucket] for bucket in buckets]) / demand.total_per_s
    drawn = np.random.default_rng(seed).choice(len(buckets), size=requests, p=weights)
    return poisson([tuple(buckets[n]) for n in drawn], demand.total_per_s, seed)


def _split(plan: Plan, arrivals: Sequence[Arrival]) -> tuple[list[Arrival], list[Arrival]]:
    """Of each bucket, the mixed replicas' share in turns."""
    turns = {}
    for bucket, shares in plan.routing.items():
        mixed = sum(s for n, s in shares.items() if plan.purchases[n].shape.role == "mixed")
        turns[bucket] = InterleavedRoundRobin({"together": mixed, "apart": 1 - mixed})
    together: list[Arrival] = []
    apart: list[Arrival] = []
    for arrival in arrivals:
        drawn = turns[Bucket(arrival.input_tokens, arrival.output_tokens)].draw()
        (together if drawn == "together" else apart).append(arrival)
    return together, apart


def _replicas(plan: Plan, profile: ThroughputProfile, role: str) -> list[Replica]:
    """Times hold the pipeline already, as step times do."""
    assert isinstance(profile, StepTimes)
    return [
        Replica(ShapeTimes(profile, purchase.shape), profile.kv_tokens(purchase.shape))
        for purchase in plan.purchases
        if purchase.shape.role == role
        for _ in range(purchase.replicas)
    ]
