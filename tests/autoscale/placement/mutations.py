"""Ways to break a plan, each of which the feasibility checker has to notice. Used by its test and
by `make prove-placement`."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from autoscale.catalog.catalog import PricedCatalog
from autoscale.placement.plan import Plan
from autoscale.placement.planner import Problem

Broken = tuple[Plan, Problem]


def _first(plan: Plan, **changes: object) -> Plan:
    """The plan with its first purchase changed, its cost kept true."""
    changed = replace(plan.purchases[0], **changes)  # type: ignore[arg-type]
    purchases = (changed, *plan.purchases[1:])
    cost = sum(purchase.usd_per_h for purchase in purchases)
    return replace(plan, purchases=purchases, usd_per_h=cost, bound_usd_per_h=0.0)


def drop_a_machine(plan: Plan, problem: Problem) -> Broken:
    first = plan.purchases[0]
    cheaper = first.usd_per_h * (first.machines - 1) / first.machines
    return _first(plan, machines=first.machines - 1, usd_per_h=cheaper), problem


def swap_a_role(plan: Plan, problem: Problem) -> Broken:
    return _first(plan, shape=replace(plan.purchases[0].shape, role="prefill")), problem


def exceed_the_quota(plan: Plan, problem: Problem) -> Broken:
    """The quota of what is bought falls below it."""
    name, held = plan.purchases[0].offer, plan.purchases[0].machines
    catalog = problem.catalog
    assert isinstance(catalog, PricedCatalog)
    offers = tuple(
        replace(offer, quota=held - 1) if offer.name == name else offer
        for offer in catalog.base_offers
    )
    return plan, replace(problem, catalog=replace(catalog, base_offers=offers))


def overfill_the_memory(plan: Plan, problem: Problem) -> Broken:
    """A model of eight times the layers, that the profile knows nothing of."""
    assert problem.model is not None
    larger = replace(problem.model, layers=8 * problem.model.layers)
    return plan, replace(problem, model=larger)


def overload_the_replicas(plan: Plan, problem: Problem) -> Broken:
    """The fullest replicas are given the work of five each. Rates are of a lone replica and on the
    safe side, so that twice as much may go well in a larger fleet; five times never does."""
    rates = problem.demand.requests_per_s
    loads = [0.0] * len(plan.purchases)
    for bucket, shares in plan.routing.items():
        for place, share in shares.items():
            shape = plan.purchases[place].shape
            most = problem.profile.requests_per_s(shape, bucket, problem.demand.slo)
            loads[place] += rates[bucket] * share / most / plan.purchases[place].replicas
    more = {bucket: 5 / max(loads) * rate for bucket, rate in rates.items()}
    return plan, replace(problem, demand=replace(problem.demand, requests_per_s=more))


def halve_the_replicas(plan: Plan, problem: Problem) -> Broken:
    """Half as many replicas (or none of one) under the overload of twice their number."""
    halved = _first(plan, replicas=plan.purchases[0].replicas // 2)
    return halved, overload_the_replicas(plan, problem)[1]


def lose_the_replicas(plan: Plan, problem: Problem) -> Broken:
    return _first(plan, replicas=0), problem


def misroute(plan: Plan, problem: Problem) -> Broken:
    """A tenth of one bucket goes nowhere."""
    bucket = next(iter(plan.routing))
    shares = {place: 0.9 * share for place, share in plan.routing[bucket].items()}
    return replace(plan, routing={**plan.routing, bucket: shares}), problem


def forget_a_bucket(plan: Plan, problem: Problem) -> Broken:
    return replace(plan, routing=dict(list(plan.routing.items())[1:])), problem


def route_to_nobody(plan: Plan, problem: Problem) -> Broken:
    bucket = next(iter(plan.routing))
    return replace(plan, routing={**plan.routing, bucket: {len(plan.purchases): 1.0}}), problem


def another_kind(plan: Plan, problem: Problem) -> Broken:
    """The shape lies on a kind that the offer is not."""
    shape = plan.purchases[0].shape
    other = "h100" if shape.kind != "h100" else "l4"
    return _first(plan, shape=replace(shape, kind=other)), problem


def no_such_offer(plan: Plan, problem: Problem) -> Broken:
    return _first(plan, offer="moon"), problem


def understate_the_cost(plan: Plan, problem: Problem) -> Broken:
    return replace(plan, usd_per_h=0.9 * plan.usd_per_h, bound_usd_per_h=0.0), problem


def overstate_the_bound(plan: Plan, problem: Problem) -> Broken:
    return replace(plan, bound_usd_per_h=1.1 * plan.usd_per_h), problem


def tighten_the_slo(plan: Plan, problem: Problem) -> Broken:
    """Shorter gaps than the fleet's steps."""
    slo = replace(problem.demand.slo, tpot_s=1e-4)
    return plan, replace(problem, demand=replace(problem.demand, slo=slo))


MUTATIONS: Mapping[str, tuple[Callable[[Plan, Problem], Broken], frozenset[str]]] = {
    "drop a machine": (drop_a_machine, frozenset({"machines"})),
    "swap a role": (swap_a_role, frozenset({"routing"})),
    "exceed the quota": (exceed_the_quota, frozenset({"quota"})),
    "overfill the memory": (overfill_the_memory, frozenset({"memory"})),
    "overload the replicas": (overload_the_replicas, frozenset({"capacity", "slo"})),
    "halve the replicas": (halve_the_replicas, frozenset({"capacity", "slo"})),
    "lose the replicas": (lose_the_replicas, frozenset({"capacity"})),
    "misroute": (misroute, frozenset({"routing"})),
    "forget a bucket": (forget_a_bucket, frozenset({"routing"})),
    "route to nobody": (route_to_nobody, frozenset({"routing"})),
    "another kind": (another_kind, frozenset({"offer"})),
    "no such offer": (no_such_offer, frozenset({"offer"})),
    "understate the cost": (understate_the_cost, frozenset({"cost"})),
    "overstate the bound": (overstate_the_bound, frozenset({"cost"})),
    "tighten the SLO": (tighten_the_slo, frozenset({"slo"})),
}
"""What breaks a plan, and the subjects under which it has to be noticed."""
