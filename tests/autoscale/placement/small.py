"""A planner for tests that tries every number of machines, with a linear program for the routing;
and small problems. It is what the explanations and the command are tested with."""

import itertools
import math
import random
import time
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from autoscale.catalog.catalog import PricedCatalog
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.model import ModelSize
from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import remembered
from autoscale.catalog.roofline import Roofline
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem

MODEL = ModelSize("small-8b", 32, 4096, 32, 8, 128, 14336, 128256)
SLO = Slo(ttft_s=1.5, tpot_s=0.1, attained=0.9)
MOST_MACHINES = 4


@dataclass(frozen=True)
class Every:
    """Mixed replicas; each offer in the tensor degree that is fastest for its $."""

    name: str = "every"

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        started_s = time.monotonic()
        offers = [o for o in problem.catalog.offers(at_s=problem.at_s) if _shape(o, problem)]
        ranges = [range(min(MOST_MACHINES, _quota(o)) + 1) for o in offers]
        counts = sorted(
            itertools.product(*ranges),
            key=lambda ns: sum(n * o.usd_per_h for n, o in zip(ns, offers, strict=True)),
        )
        for machines in counts:
            bought = [(o, n) for o, n in zip(offers, machines, strict=True) if n]
            plan = _routed(bought, problem)
            if plan is not None:
                return replace(plan, solved_s=time.monotonic() - started_s)
        raise InfeasibleError("slo or quota: no number of machines serves it")


def _quota(offer: Offer) -> int:
    return MOST_MACHINES if offer.quota is None else offer.quota


def _shape(offer: Offer, problem: Problem) -> ReplicaShape | None:
    """The first shape of the offer's kind that fills whole machines."""
    fit = [s for s in problem.shapes if s.kind == offer.kind and s.accelerators <= offer.count]
    return fit[0] if fit else None


def _routed(bought: list[tuple[Offer, int]], problem: Problem) -> Plan | None:
    demand, purchases = problem.demand, []
    for offer, machines in bought:
        shape = _shape(offer, problem)
        assert shape is not None
        replicas = machines * (offer.count // shape.accelerators)
        cost = machines * offer.usd_per_h
        purchases.append(Purchase(offer.name, machines, shape, replicas, cost))
    buckets = list(demand.requests_per_s)
    loads = np.array([[_load(p, b, problem) for p in purchases] for b in buckets])
    shares = _shares(loads, [p.replicas for p in purchases]) if purchases else None
    if shares is None:
        return None
    routing = {
        bucket: {at: float(share) for at, share in enumerate(row) if share > 1e-9}
        for bucket, row in zip(buckets, shares, strict=True)
    }
    cost = sum(purchase.usd_per_h for purchase in purchases)
    source = problem.profile.source
    return Plan(tuple(purchases), cost, cost, "every", routing=routing, sources=(source,))


def _load(purchase: Purchase, bucket: Bucket, problem: Problem) -> float:
    rate = problem.profile.requests_per_s(purchase.shape, bucket, problem.demand.slo)
    return problem.demand.requests_per_s[bucket] / rate if rate > 0 else math.inf


def _shares(loads: "np.ndarray", replicas: list[int]) -> "np.ndarray | None":
    """Shares by bucket and purchase that overload no purchase; None where there are none."""
    buckets, purchases = loads.shape
    size = buckets * purchases
    finite = np.where(np.isfinite(loads), loads, 0.0)
    per_purchase = np.zeros((purchases, size))
    per_bucket = np.zeros((buckets, size))
    for b, p in itertools.product(range(buckets), range(purchases)):
        per_purchase[p, b * purchases + p] = finite[b, p]
        per_bucket[b, b * purchases + p] = 1
    bounds = [(0, 1 if np.isfinite(load) else 0) for load in loads.ravel()]
    found = linprog(np.zeros(size), per_purchase, replicas, per_bucket, np.ones(buckets), bounds)
    return np.asarray(found.x).reshape(loads.shape) if found.success else None


OFFERS = (
    Offer("l4", "l4", 1, "r", "a", "on_demand", 0.8, quota=3, source="a test"),
    Offer("a10g", "a10g", 1, "r", "a", "on_demand", 1.0, quota=3, source="a test"),
    Offer("a100", "a100-40g", 1, "r", "b", "on_demand", 2.75, quota=2, source="a test"),
)


def problem(
    rates: dict[Bucket, float] | None = None,
    slo: Slo = SLO,
    offers: tuple[Offer, ...] = OFFERS,
) -> Problem:
    """Three kinds, two buckets, roofline speeds."""
    kinds = read_kinds()
    rates = {Bucket(128, 64): 8.0, Bucket(1024, 128): 2.0} if rates is None else rates
    return Problem(
        Demand(rates, slo),
        PricedCatalog(kinds, offers),
        remembered(Roofline(kinds, MODEL)),
        [ReplicaShape(kind) for kind in dict.fromkeys(offer.kind for offer in offers)],
        model=MODEL,
    )


def random_problem(chance: random.Random) -> Problem:
    """Other prices, quotas, lengths, rates and limits; not all have a plan."""
    kinds = ("l4", "a10g", "a100-40g", "a100-80g", "h100")
    chosen = chance.sample(kinds, chance.randint(2, 3))
    price = {"l4": 0.8, "a10g": 1.0, "a100-40g": 2.75, "a100-80g": 3.4, "h100": 6.9}
    offers = tuple(
        Offer(
            kind,
            kind,
            1,
            "r",
            "a",
            "on_demand",
            round(price[kind] * chance.uniform(0.6, 1.6), 3),
            quota=chance.randint(1, 4),
        )
        for kind in chosen
    )
    lengths = [(128, 64), (256, 128), (512, 128), (1024, 128), (2048, 256)]
    rates = {Bucket(*length): chance.uniform(0.5, 6) for length in chance.sample(lengths, 2)}
    slo = Slo(chance.choice((1.0, 2.0)), chance.choice((0.08, 0.12)), 0.9)
    return problem(rates, slo, offers)
