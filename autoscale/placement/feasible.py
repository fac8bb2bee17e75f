"""Checks a plan again from nothing: what is bought, what fits, who serves whom, and by simulation
how fast. Shares no formula with the planners; counts memory matrix by matrix itself.

A plan without faults is feasible; a check that could not be made says so in `unchecked`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import StepTimes
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.feasible_memory import memory_faults
from autoscale.placement.feasible_spans import span_faults
from autoscale.placement.plan import Plan, Purchase
from autoscale.placement.planner import Problem
from autoscale.placement.simulation import Outcome, simulate

Subject = Literal[
    "offer", "quota", "machines", "cost", "memory", "routing", "capacity", "slo", "flow"
]

TOLERANCE = 1e-6
ERRORS = 2.0  # standard errors by which a simulated share may miss


@dataclass(frozen=True)
class Fault:
    """What is wrong with a plan. what: a sentence with the numbers."""

    subject: Subject
    what: str


@dataclass(frozen=True)
class Verdict:
    """faults: () for a feasible plan. unchecked: what could not be checked, and why. outcome: of
    the simulation, None where there was none."""

    faults: tuple[Fault, ...]
    unchecked: tuple[str, ...] = ()
    outcome: Outcome | None = None

    @property
    def feasible(self) -> bool:
        return not self.faults


def check(plan: Plan, problem: Problem, *, seed: int = 0) -> Verdict:
    """All faults of a plan for a problem. seed: of the simulated arrivals."""
    offers = {offer.name: offer for offer in problem.catalog.offers(at_s=problem.at_s)}
    faults = [*_bought(plan, offers), *_cost(plan, offers)]
    unchecked = []
    if problem.model is None:
        unchecked.append("memory: the model's size is not known")
    else:
        faults += (Fault("memory", each) for each in memory_faults(plan, problem))
    faults += (Fault("flow", what) for what in span_faults(plan, problem, offers))
    outcome = None
    if _serves(plan):
        faults += [*_routed(plan, problem), *_room(plan, problem)]
        faults += _loads(plan, problem)
        if isinstance(problem.profile, StepTimes) and not faults:
            outcome = _simulated(plan, problem, offers, seed)
            faults += _slow(outcome, problem.demand.slo)
        elif not faults:
            source = problem.profile.source
            unchecked.append(f"slo: no simulation, since the profile ({source}) knows no steps")
    return Verdict(tuple(faults), tuple(unchecked), outcome)


def _serves(plan: Plan) -> bool:
    """Whether requests are routed to whole replicas; training is not, and spans have flows."""
    return not plan.spans and any(p.shape.role != "training" for p in plan.purchases)


def machines_for(purchase: Purchase, offer: Offer) -> int:
    """Machines that the replicas need: several to a machine, or one over several machines."""
    needed = purchase.shape.accelerators
    if needed <= offer.count:
        return -(-purchase.replicas // (offer.count // needed))
    return purchase.replicas * -(-needed // offer.count)


def _bought(plan: Plan, offers: Mapping[str, Offer]) -> Iterator[Fault]:
    held: dict[str, int] = {}
    for purchase in plan.purchases:
        offer = offers.get(purchase.offer)
        if offer is None:
            yield Fault("offer", f"{purchase.offer} is not on offer")
            continue
        held[offer.name] = held.get(offer.name, 0) + purchase.machines
        shape = purchase.shape
        if shape.kind != offer.kind:
            yield Fault("offer", f"{offer.name} is {offer.kind}, the plan puts {shape.kind} there")
        if shape.tensor > offer.count:
            what = f"{shape.tensor} accelerators share each layer, {offer.name} has {offer.count}"
            yield Fault("machines", what)
        if purchase.replicas < 0 or purchase.machines < 0:
            yield Fault("machines", f"{offer.name}: a negative number of machines or replicas")
        needed = machines_for(purchase, offer)
        if purchase.machines < needed:
            what = f"{purchase.replicas} replicas need {needed} of {offer.name}, the plan buys"
            yield Fault("machines", f"{what} {purchase.machines}")
    for name, machines in held.items():
        quota = offers[name].quota
        if quota is not None and machines > quota:
            yield Fault("quota", f"{machines} of {name}, the quota is {quota}")


def _cost(plan: Plan, offers: Mapping[str, Offer]) -> Iterator[Fault]:
    for purchase in plan.purchases:
        if purchase.offer not in offers:
            continue
        due = purchase.machines * offers[purchase.offer].usd_per_h
        if abs(due - purchase.usd_per_h) > TOLERANCE * max(1.0, due):
            what = f"{purchase.machines} of {purchase.offer} cost {due:.4f} $/h"
            yield Fault("cost", f"{what}, the plan says {purchase.usd_per_h:.4f}")
    total = sum(purchase.usd_per_h for purchase in plan.purchases)
    if abs(total - plan.usd_per_h) > TOLERANCE * max(1.0, total):
        said = f"the plan says {plan.usd_per_h:.4f}"
        yield Fault("cost", f"the purchases cost {total:.4f} $/h, {said}")
    if plan.bound_usd_per_h > plan.usd_per_h * (1 + TOLERANCE) + TOLERANCE:
        what = f"the bound {plan.bound_usd_per_h:.4f} $/h is above the cost {plan.usd_per_h:.4f}"
        yield Fault("cost", what)


def _routed(plan: Plan, problem: Problem) -> Iterator[Fault]:
    """Each phase of each bucket is served in full by purchases that can."""
    for bucket, rate in problem.demand.requests_per_s.items():
        if rate <= 0:
            continue
        shares = plan.routing.get(bucket, {})
        where = f"requests of {bucket.input_tokens} + {bucket.output_tokens} tokens"
        wrong = [n for n in shares if not 0 <= n < len(plan.purchases)]
        if wrong or any(not share >= 0 for share in shares.values()):
            yield Fault("routing", f"{where}: a negative share, or one of a purchase {wrong}")
            continue
        for phase in ("prefill", "decode"):
            roles = ("mixed", phase)
            served = sum(s for n, s in shares.items() if plan.purchases[n].shape.role in roles)
            if abs(served - 1) > TOLERANCE:
                yield Fault("routing", f"{where}: {served:.6f} of their {phase} is routed, not 1")


def _room(plan: Plan, problem: Problem) -> Iterator[Fault]:
    """Keys and values of one whole request fit wherever it is sent."""
    for bucket, place in _served(plan, problem):
        shape = plan.purchases[place].shape
        needed = bucket.input_tokens + (bucket.output_tokens if shape.role != "prefill" else 0)
        room = problem.profile.kv_tokens(shape)
        if room < needed:
            what = f"a replica of {plan.purchases[place].offer} has room for {room} tokens"
            yield Fault("memory", f"{what}, a request of {tuple(bucket)} needs {needed}")


def _loads(plan: Plan, problem: Problem) -> Iterator[Fault]:
    """No purchase is given more than its replicas can do. Where steps are known the simulation is
    the judge of the SLO, and this asks only that queues do not grow for ever."""
    timed = isinstance(problem.profile, StepTimes)
    slo = Slo(attained=0.5) if timed else problem.demand.slo
    loads = [0.0] * len(plan.purchases)
    for bucket, place in _served(plan, problem):
        rate = problem.profile.requests_per_s(plan.purchases[place].shape, bucket, slo)
        given = problem.demand.requests_per_s[bucket] * plan.routing[bucket][place]
        loads[place] += given / rate if rate > 0 else float("inf")
    for purchase, load in zip(plan.purchases, loads, strict=True):
        if load > purchase.replicas + TOLERANCE:
            what = f"{purchase.offer} is given the work of {load:.4f} replicas"
            yield Fault("capacity", f"{what}, it has {purchase.replicas}")


def _served(plan: Plan, problem: Problem) -> Iterator[tuple[Bucket, int]]:
    """Each demanded bucket with each purchase that is to serve some of it."""
    for bucket, rate in problem.demand.requests_per_s.items():
        for place, share in plan.routing.get(bucket, {}).items():
            if rate > 0 and share > TOLERANCE and 0 <= place < len(plan.purchases):
                yield bucket, place


def _simulated(plan: Plan, problem: Problem, offers: Mapping[str, Offer], seed: int) -> Outcome:
    times = problem.profile
    assert isinstance(times, StepTimes)
    token_bytes = problem.model.kv_bytes_per_token if problem.model else 0.0
    slowest = min(offers[purchase.offer].network_gb_per_s for purchase in plan.purchases) * 1e9
    kv_tokens = [problem.profile.kv_tokens(purchase.shape) for purchase in plan.purchases]

    def handoff_s(tokens: int) -> float:
        return tokens * token_bytes / slowest

    return simulate(plan, problem.demand, times, kv_tokens, handoff_s=handoff_s, seed=seed)


def _slow(outcome: Outcome, slo: Slo) -> Iterator[Fault]:
    error = (slo.attained * (1 - slo.attained) / outcome.requests) ** 0.5
    if outcome.attained < slo.attained - ERRORS * error:
        what = f"{outcome.attained:.1%} of {outcome.requests} simulated requests keep the SLO"
        times = f"first token {outcome.ttft_s:.3g} s, gap {outcome.tpot_s:.3g} s"
        yield Fault("slo", f"{what}, asked are {slo.attained:.1%} ({times} at that share)")
