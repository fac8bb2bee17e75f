"""What machines cost when they can be lost: price and risk in one objective, roles and kinds mixed.

A spot machine that is lost costs, beyond its bill, a replacement at the on-demand price for as long
as the next one takes to start, and the work that its requests had behind them, done again at that
price. So every offer has an expected price,

    price + losses/h * (startup_h + recompute_h) * on-demand price,

and the aggregate program chooses kinds, shapes, roles and markets together. Capacity is whole in
expectation, since the replacement is paid for; how many are lost at a time is for the spot
policies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate import AggregatePlanner
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import Problem

HOUR_S = 3600.0


@dataclass(frozen=True)
class Risk:
    """losses_per_h: of one machine, by offer; 0 for what the table does not name on demand or
    reserved, a refusal on spot. recompute_s: machine time to do again what its requests had behind
    them when a machine is lost, by role, for about half of their length in the mean."""

    losses_per_h: Mapping[str, float]
    recompute_s: Mapping[str, float] = field(default_factory=dict)
    source: str = "losses as given"

    def __post_init__(self) -> None:
        for name, rate in self.losses_per_h.items():
            if not 0 <= rate < math.inf:
                raise ValueError(f"losses_per_h of {name} is {rate!r}; accepted is 0 or more")

    def losses(self, offer: Offer) -> float:
        """ValueError for a spot offer without a rate: free of risk is not a default."""
        if offer.name in self.losses_per_h:
            return self.losses_per_h[offer.name]
        if offer.market == "spot":
            raise ValueError(
                f"losses_per_h has no rate for the spot offer {offer.name}; "
                "each spot offer needs one"
            )
        return 0.0


def losses_from_survival(horizon_s: float, survival: float) -> float:
    """Losses per machine and hour of a constant hazard under which that share survives the
    horizon."""
    if not (0 < survival <= 1 and horizon_s > 0):
        raise ValueError(f"survival is {survival!r} over {horizon_s!r} s; accepted is above 0 up "
                         "to 1, over more than 0 s")  # fmt: skip
    return -math.log(survival) / (horizon_s / HOUR_S)


@dataclass(frozen=True)
class ExpectedPrice:
    """Expected $/h of one machine. stand_in_usd_per_h: by offer, the on-demand price of a machine
    that can take its place."""

    risk: Risk
    stand_in_usd_per_h: Mapping[str, float]

    @classmethod
    def of(cls, problem: Problem, risk: Risk) -> "ExpectedPrice":
        """The stand-in is the cheapest on-demand machine with at least as many accelerators of the
        kind; ValueError where none is sold, since any other price would be a guess."""
        offers = problem.catalog.offers(at_s=problem.at_s)
        stand_in = {}
        for offer in offers:
            if risk.losses(offer) == 0:
                continue
            prices = [
                other.usd_per_h
                for other in offers
                if other.market == "on_demand"
                and other.kind == offer.kind
                and other.count >= offer.count
            ]
            if not prices:
                raise ValueError(
                    f"offer {offer.name} can be lost and no on-demand offer of {offer.count} or "
                    f"more {offer.kind} is there to stand in; add one to the catalogue"
                )
            stand_in[offer.name] = min(prices)
        return cls(risk, stand_in)

    def __call__(self, offer: Offer, shape: ReplicaShape) -> float:
        return offer.usd_per_h + self.risk_usd_per_h(offer, shape)

    def risk_usd_per_h(self, offer: Offer, shape: ReplicaShape) -> float:
        """Beyond the bill, per machine and hour."""
        losses = self.risk.losses(offer)
        if losses == 0:
            return 0.0
        again_s = self.risk.recompute_s.get(shape.role, 0.0)
        return losses * (offer.startup_s + again_s) / HOUR_S * self.stand_in_usd_per_h[offer.name]


@dataclass(frozen=True)
class MarketPlanner:
    """The aggregate planner over expected prices. Shapes of the roles prefill and decode are paired
    where that is cheaper than mixed ones; single kinds, single roles and single markets are among
    its choices, so that it is never worse than any of them."""

    risk: Risk
    slices: int | None = None
    name: str = "market"

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        price = ExpectedPrice.of(problem, self.risk)
        planner = AggregatePlanner(self.slices)
        plan = planner.plan_at(problem, price, deadline_s=deadline_s)
        return with_bills(plan, problem, price)


def with_bills(plan: Plan, problem: Problem, price: ExpectedPrice) -> Plan:
    """A plan in expected prices, told in bills and risk."""
    offers = {offer.name: offer for offer in problem.catalog.offers(at_s=problem.at_s)}
    risk_usd = sum(
        each.machines * price.risk_usd_per_h(offers[each.offer], each.shape)
        for each in plan.purchases
    )
    return replace(
        plan,
        usd_per_h=sum(each.usd_per_h for each in plan.purchases),
        bound_usd_per_h=plan.bound_usd_per_h - risk_usd,
        risk_usd_per_h=risk_usd,
        solver=plan.solver.replace("aggregate", "market", 1),
        sources=(*plan.sources, price.risk.source),
    )


def expected_usd_per_h(plan: Plan) -> float:
    """Bills and risk together: what plans are compared by."""
    return plan.usd_per_h + plan.risk_usd_per_h


def at_risk(plan: Plan, problem: Problem) -> tuple[Purchase, ...]:
    """The purchases that a market can take back."""
    markets = {offer.name: offer.market for offer in problem.catalog.offers(at_s=problem.at_s)}
    return tuple(each for each in plan.purchases if markets[each.offer] == "spot")
