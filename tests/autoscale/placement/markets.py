"""Random catalogues with prices, markets, roles and risk, and what single kinds would cost."""

import itertools
from collections.abc import Mapping

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand
from autoscale.placement.market import HOUR_S, Risk
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import Problem
from tests.autoscale.placement.aggregates import Key, Rates, Shelf

BUCKETS = (Bucket(200, 100), Bucket(2000, 100), Bucket(200, 1000), Bucket(4000, 500))


def random_market(rng: np.random.Generator) -> tuple[Problem, Risk]:
    """Three to five kinds with their own compute and bandwidth per dollar, each on demand and often
    on spot in one or two zones; all three roles."""
    rates: dict[Key, float] = {}
    shapes: list[ReplicaShape] = []
    offers: list[Offer] = []
    losses: dict[str, float] = {}
    for number in range(int(rng.integers(3, 6))):
        kind = f"kind{number}"
        price = round(float(rng.uniform(0.5, 6.0)), 2)
        roles = ("mixed", "prefill", "decode")
        own = [ReplicaShape(kind, role=role) for role in roles]  # type: ignore[arg-type]
        shapes += own
        rates |= _rates(own, price * rng.uniform(0.4, 1.6), price * rng.uniform(0.4, 1.6))
        offers.append(Offer(f"{kind}-od", kind, 1, "r", "a", "on_demand", price))
        for zone in range(int(rng.integers(0, 3))):
            name = f"{kind}-spot{zone}"
            cheap = round(price * float(rng.uniform(0.25, 0.7)), 3)
            quota = int(rng.integers(1, 6))
            start_s = float(rng.uniform(60, 900))
            offers.append(Offer(name, kind, 1, "r", str(zone), "spot", cheap, quota, start_s))
            losses[name] = float(rng.choice([0.02, 0.1, 0.5, 2.0, 6.0]))
    asked = {bucket: float(rng.uniform(0.5, 4.0)) for bucket in BUCKETS}
    problem = Problem(Demand(asked), Shelf(tuple(offers)), Rates(rates), tuple(shapes))
    again = {
        "mixed": float(rng.uniform(0, 60)),
        "prefill": 1.0,
        "decode": float(rng.uniform(0, 90)),
    }
    return problem, Risk(losses, again)


def _rates(shapes: list[ReplicaShape], compute: float, bandwidth: float) -> dict[Key, float]:
    """Prompts at the pace of compute, tokens at that of bandwidth; both on one replica disturb each
    other by a tenth."""
    rates: dict[Key, float] = {}
    for bucket in BUCKETS:
        prompt_s = bucket.input_tokens / (1500.0 * compute)
        token_s = bucket.output_tokens / (300.0 * bandwidth)
        whole = {"mixed": 1.1 * (prompt_s + token_s), "prefill": prompt_s, "decode": token_s}
        for shape in shapes:
            rates[shape, bucket] = 1 / whole[shape.role]
    return rates


def expected_machine_usd(offer: Offer, role: str, problem: Problem, risk: Risk) -> float:
    """Straight from the words: bill, and per loss a stand-in for start-up and the work again."""
    stand_in = min(
        each.usd_per_h
        for each in problem.catalog.offers()
        if each.kind == offer.kind and each.market == "on_demand"
    )
    away_h = (offer.startup_s + risk.recompute_s.get(role, 0.0)) / HOUR_S
    return offer.usd_per_h + risk.losses_per_h.get(offer.name, 0.0) * away_h * stand_in


def single_kind_usd(problem: Problem, risk: Risk, kind: str) -> float:
    """The best of: all on mixed replicas of the kind, or all apart on it; counts rounded up, bought
    at the cheapest expected prices within quotas. No solver: only these plans are single."""
    asked: Mapping[Bucket, float] = problem.demand.requests_per_s
    best = np.inf
    for roles in (("mixed",), ("prefill", "decode")):
        needs = []
        for role in roles:
            shape = ReplicaShape(kind, role=role)  # type: ignore[arg-type]
            load = sum(
                rate / problem.profile.requests_per_s(shape, bucket, problem.demand.slo)
                for bucket, rate in asked.items()
            )
            needs.append((role, int(np.ceil(load - 1e-6))))
        best = min(best, _bought(problem, risk, kind, needs))
    return float(best)


def _bought(problem: Problem, risk: Risk, kind: str, needs: list[tuple[str, int]]) -> float:
    """Cheapest purchase of so many machines for each role: every split of the spot quotas."""
    offers = [offer for offer in problem.catalog.offers() if offer.kind == kind]
    spots = [offer for offer in offers if offer.market == "spot"]
    demanded = min(o.usd_per_h for o in offers if o.market == "on_demand")
    best = np.inf
    first, first_needed = needs[0]
    ranges = [range(min(offer.quota or 0, first_needed) + 1) for offer in spots]
    for taken in itertools.product(*ranges):
        if sum(taken) > first_needed:
            continue
        usd = (first_needed - sum(taken)) * demanded
        for offer, n in zip(spots, taken, strict=True):
            usd += n * expected_machine_usd(offer, first, problem, risk)
        for role, needed in needs[1:]:
            left = sorted(
                (expected_machine_usd(offer, role, problem, risk), (offer.quota or 0) - n)
                for offer, n in zip(spots, taken, strict=True)
            )
            for each_usd, there in [*left, (demanded, needed)]:
                used = min(needed, there) if each_usd <= demanded else 0
                usd += used * each_usd
                needed -= used
        best = min(best, usd)
    return float(best)


def simulated_usd_per_h(
    rng: np.random.Generator, offer: Offer, role: str, stand_in_usd: float, risk: Risk, hours: float
) -> float:
    """One machine kept up for many hours: exponential lives; after each, a stand-in while the next
    one starts and while lost work is done again. The next one is paid for from when it is asked
    for."""
    mean_life_h = 1 / risk.losses_per_h[offer.name]
    away_h = (offer.startup_s + risk.recompute_s.get(role, 0.0)) / HOUR_S
    clock_h = stand_in_h = 0.0
    while (clock_h := clock_h + float(rng.exponential(mean_life_h))) < hours:
        stand_in_h += away_h
    return offer.usd_per_h + stand_in_h * stand_in_usd / hours
