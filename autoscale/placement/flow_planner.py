"""A planner of one model over unlike machines: which to buy, which layers where, how much flows."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Demand
from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_place import Bought, buy
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.spans import Pool, SpanProblem, Stage

MOST_MACHINES = 256  # of an offer without quota


@dataclass(frozen=True)
class SpanRates:
    """Tokens per second of a kind by tensor degree and layers held. source: where they come
    from."""

    kind: str
    by_tensor: Mapping[int, tuple[float, ...]]
    source: str


class SpanPlanner:
    """The cheapest offers whose nodes carry the demand's tokens (input and output) through all
    layers. Speaks of tokens per second only: limits of the Slo are refused, for a max-flow knows no
    waiting time."""

    name = "spans"

    def __init__(self, layers: int, rates: tuple[SpanRates, ...]) -> None:
        self._layers = layers
        self._rates = {each.kind: each for each in rates}

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        """InfeasibleError with the most that the offers can carry; ValueError for an Slo."""
        slo = problem.demand.slo
        if slo.ttft_s is not None or slo.tpot_s is not None:
            raise ValueError("slo: layer spans are planned for tokens per second; leave it open")
        began = time.monotonic()
        offers = [o for o in problem.catalog.offers(at_s=problem.at_s) if o.kind in self._rates]
        if not offers:
            raise InfeasibleError(f"no offer of {', '.join(self._rates)}")
        spans = self._span_problem(offers)
        bought = buy(spans, tokens_per_s(problem.demand), deadline_s=deadline_s)
        return self._as_plan(spans, offers, bought, time.monotonic() - began)

    def _span_problem(self, offers: list[Offer]) -> SpanProblem:
        pools, stages = [], []
        for offer in offers:
            machines = MOST_MACHINES if offer.quota is None else offer.quota
            pools.append(Pool(offer.name, machines, offer.count, offer.usd_per_h))
            for tensor, rates in self._rates[offer.kind].by_tensor.items():
                if offer.count % tensor == 0 and rates:
                    stages.append(Stage(offer.name, rates, tensor))
        return SpanProblem(self._layers, tuple(pools), tuple(stages))

    def _as_plan(
        self, spans: SpanProblem, offers: list[Offer], bought: Bought, solved_s: float
    ) -> Plan:
        layout = bought.placement.layout
        purchases, limits, kinds = [], list[str](), list[str]()
        for offer, machines in zip(offers, bought.machines, strict=True):
            degrees = Counter(
                spans.stages[node.stage].tensor
                for node in layout.nodes
                if spans.stages[node.stage].pool == offer.name
            )
            if not machines or not degrees:
                continue
            shape = ReplicaShape(offer.kind, tensor=degrees.most_common(1)[0][0])
            usd = machines * offer.usd_per_h
            purchases.append(Purchase(offer.name, machines, shape, degrees.total(), usd))
            kinds.append(offer.kind)
            if offer.quota is not None and machines >= offer.quota:
                limits.append("quota")
        return Plan(
            tuple(purchases),
            bought.usd_per_h,
            bought.bound_usd_per_h,
            f"{self.name}: {bought.placement.solver}",
            spans=layout.spans(),
            flow_tokens_per_s=layout_flow(spans, layout).links,
            limits=tuple(dict.fromkeys(limits)),
            sources=tuple(dict.fromkeys(self._rates[kind].source for kind in kinds)),
            solved_s=solved_s,
        )


def tokens_per_s(demand: Demand) -> float:
    """Tokens in and out that pass through every layer."""
    return sum(
        rate * (bucket.input_tokens + bucket.output_tokens)
        for bucket, rate in demand.requests_per_s.items()
    )
