"""A planner of one model over unlike machines: which to buy, which layers where, how much flows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from autoscale.catalog.model import ACTIVATION_BYTES, ModelSize
from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import LayerTimes
from autoscale.placement.demand import Demand
from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_place import Bought, buy
from autoscale.placement.flow_rates import LayerLoad, LayerPace, largest, span_rates
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.spans_layout import Pool, SpanProblem, Stage

MOST_MACHINES = 256  # of an offer without quota
# A pass waits at worst for the whole of the pass before it, at every node.
WAITS = 2.0


class SpansPlanner:
    """The cheapest machines, each one node over some of the layers, that carry the demand's output
    tokens; prompts count as time.

    Takes a profile with times of layers and a model. The SLO is kept by construction: batches are
    no larger than that all layers, each pass waited for once, stay within tpot_s, and kinds whose
    prompts take longer than ttft_s so counted are left out. No node passes on more than its network
    carries. A machine of several accelerators is
    asked for as one kind: "L4x2".
    """

    name = "spans"

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        """InfeasibleError with what binds; ValueError where the problem says too little."""
        began = time.monotonic()
        model, times = problem.model, problem.profile
        if model is None:
            raise ValueError("model: layer spans need the model's size; give its layers and widths")
        if not isinstance(times, LayerTimes):
            raise ValueError(f"profile: {problem.profile.source} has no times of single layers")
        offers = list(problem.catalog.offers(at_s=problem.at_s))
        nodes = [(offer, _rates(offer, problem, model, times)) for offer in offers]
        nodes = [(offer, rates) for offer, rates in nodes if rates]
        if not nodes:
            raise InfeasibleError("memory or SLO: no offer's machine can hold a layer within both")
        spans = _span_problem(nodes, model)
        bought = buy(spans, output_tokens_per_s(problem.demand), deadline_s=deadline_s)
        return _as_plan(_Found(spans, [offer for offer, _ in nodes], bought), problem, began)


def output_tokens_per_s(demand: Demand) -> float:
    """What flows: each output token passes all layers once."""
    return sum(rate * bucket.output_tokens for bucket, rate in demand.requests_per_s.items())


def node_kind(offer: Offer) -> str:
    """The name under which times of a whole machine are asked for."""
    return offer.kind if offer.count == 1 else f"{offer.kind}x{offer.count}"


def _mean(demand: Demand, place: int) -> float:
    """Mean of a bucket's field over requests."""
    return sum(rate * bucket[place] for bucket, rate in demand.requests_per_s.items()) / (
        demand.total_per_s
    )


def _rates(
    offer: Offer, problem: Problem, model: ModelSize, times: LayerTimes
) -> tuple[float, ...]:
    """Of one machine as a node; none where its kind has no times or the SLO is out of reach."""
    demand, kind = problem.demand, node_kind(offer)
    bits = min((shape.weight_bits for shape in problem.shapes), default=16)
    load = LayerLoad(
        model.layer_weight_bytes(bits),
        model.kv_layer_bytes_per_token,
        _mean(demand, 0),
        _mean(demand, 1),
    )

    def decode_s(batch: float) -> float:
        return times.layer_s(kind, "decode", batch)

    try:
        prompt_s = times.layer_s(kind, "prefill", load.input_tokens)
    except ValueError:
        return ()
    slo, passes = demand.slo, WAITS * model.layers
    if slo.ttft_s is not None and passes * prompt_s > slo.ttft_s:
        return ()
    most = largest(decode_s, float("inf") if slo.tpot_s is None else slo.tpot_s / passes)
    memory = offer.count * problem.catalog.kind(offer.kind).memory_bytes
    rates = span_rates(load, LayerPace(prompt_s, decode_s, most), memory, model.layers)
    return tuple(min(rate, _network_rate(offer, model, load)) for rate in rates)


def _network_rate(offer: Offer, model: ModelSize, load: LayerLoad) -> float:
    """Output tokens per second whose activations, and those of their prompts, a machine's network
    passes on. As a cap of every node it keeps any link from binding."""
    tokens_per_output = 1 + load.input_tokens / load.output_tokens
    bytes_per_output = model.hidden * ACTIVATION_BYTES * tokens_per_output
    return offer.network_gb_per_s * 1e9 / bytes_per_output


def _span_problem(
    nodes: Sequence[tuple[Offer, tuple[float, ...]]], model: ModelSize
) -> SpanProblem:
    pools, stages = [], []
    for offer, rates in nodes:
        machines = MOST_MACHINES if offer.quota is None else offer.quota
        names = tuple(f"{offer.name}/{n}" for n in range(machines))
        pools.append(Pool(offer.name, machines, 1, offer.usd_per_h, names))
        stages.append(Stage(offer.name, rates))
    return SpanProblem(model.layers, tuple(pools), tuple(stages))


@dataclass(frozen=True)
class _Found:
    spans: SpanProblem
    offers: Sequence[Offer]
    bought: Bought


def _as_plan(found: _Found, problem: Problem, began: float) -> Plan:
    purchases, limits = [], list[str]()
    layout = found.bought.placement.layout
    bits = min((shape.weight_bits for shape in problem.shapes), default=16)
    for offer, machines in zip(found.offers, found.bought.machines, strict=True):
        if machines:
            shape = ReplicaShape(offer.kind, tensor=offer.count, weight_bits=bits)
            usd = machines * offer.usd_per_h
            purchases.append(Purchase(offer.name, machines, shape, machines, usd))
        if offer.quota is not None and machines == offer.quota:
            limits.append("quota")
    return Plan(
        tuple(purchases),
        found.bought.usd_per_h,
        found.bought.bound_usd_per_h,
        f"spans: {found.bought.placement.solver}",
        spans=layout.spans(),
        flow_tokens_per_s=_scaled(found, output_tokens_per_s(problem.demand)),
        limits=tuple(dict.fromkeys(limits)),
        sources=(problem.profile.source,),
        solved_s=time.monotonic() - began,
    )


def _scaled(found: _Found, asked: float) -> dict[tuple[str, str], float]:
    """The flow at the demand, not at the most that the layout could carry."""
    flow = layout_flow(found.spans, found.bought.placement.layout)
    return {ends: tokens * asked / flow.tokens_per_s for ends, tokens in flow.links.items()}
