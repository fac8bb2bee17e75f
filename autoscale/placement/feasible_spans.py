"""Checks layer spans over unlike nodes and the flow between them, edge by edge: every layer is
held, what enters a node leaves it, no node and no link carries more than it can. Used by
`feasible`."""

from collections.abc import Iterator, Mapping

from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import LayerTimes
from autoscale.placement.plan import LayerSpan, Plan
from autoscale.placement.planner import Problem

SOURCE, SINK = "source", "sink"
TOLERANCE = 1e-6
TOKEN_ID_BYTES = 4
ACTIVATION_BYTES = 2
BATCHES = tuple(2**n for n in range(13))


def span_faults(plan: Plan, problem: Problem, offers: Mapping[str, Offer]) -> Iterator[str]:
    """A sentence for each fault; nothing for a plan without spans."""
    if not plan.spans:
        return
    wrong = list(_spans(plan, problem, offers))
    yield from wrong
    if not wrong:
        yield from _edges(plan, problem, offers)
        yield from _nodes(plan, problem, offers)


def offer_of(node: str) -> str:
    """`g6.xlarge/3` -> `g6.xlarge`."""
    return node.rpartition("/")[0]


def _spans(plan: Plan, problem: Problem, offers: Mapping[str, Offer]) -> Iterator[str]:
    machines: dict[str, int] = {}
    for purchase in plan.purchases:
        machines[purchase.offer] = machines.get(purchase.offer, 0) + purchase.machines
    seen: set[str] = set()
    for span in plan.spans:
        offer, number = offer_of(span.node), span.node.rpartition("/")[2]
        if offer not in offers or not number.isdecimal() or int(number) >= machines.get(offer, 0):
            yield f"{span.node} is no machine that the plan buys"
        if span.node in seen:
            yield f"{span.node} holds two spans"
        seen.add(span.node)
        if not 0 <= span.start < span.stop:
            yield f"{span.node} holds layers {span.start} to {span.stop}"
        elif problem.model is not None and offer in offers:
            yield from _held(span, offers[offer], problem, plan)
    last = problem.model.layers if problem.model else max(span.stop for span in plan.spans)
    held = {layer for span in plan.spans for layer in range(span.start, span.stop)}
    missing = sorted(set(range(last)) - held)
    if missing or max(held, default=0) >= last:
        yield f"layers {missing} are nowhere, or there are more than {last}"


def _held(span: LayerSpan, offer: Offer, problem: Problem, plan: Plan) -> Iterator[str]:
    assert problem.model is not None
    bits = next(p.shape.weight_bits for p in plan.purchases if p.offer == offer.name)
    weights = (span.stop - span.start) * problem.model.layer_weight_bytes(bits)
    memory = offer.count * problem.catalog.kind(offer.kind).memory_bytes
    if weights > memory:
        what = f"{span.node}: layers of {weights / 1e9:.2f} GB do not fit into {memory / 1e9:.2f}"
        yield what


def _edges(plan: Plan, problem: Problem, offers: Mapping[str, Offer]) -> Iterator[str]:
    """Where a link may go, and what it may carry."""
    spans = {span.node: span for span in plan.spans}
    last = max(span.stop for span in plan.spans)
    for (start, end), tokens in plan.flow_tokens_per_s.items():
        edge = f"{start} -> {end}"
        if not {start, end} <= {*spans, SOURCE, SINK} or end == SOURCE or start == SINK:
            yield f"{edge}: no such nodes"
            continue
        done = 0 if start == SOURCE else spans[start].stop
        joined = done == last if end == SINK else spans[end].start <= done < spans[end].stop
        if not joined:
            yield f"{edge}: the layers do not follow each other"
        if tokens < -TOLERANCE:
            yield f"{edge}: {tokens} tokens/s"
        if problem.model is not None:
            ids = SOURCE in (start, end) or end == SINK
            size = TOKEN_ID_BYTES if ids else problem.model.hidden * ACTIVATION_BYTES
            ends = [offers[offer_of(each)] for each in (start, end) if each in spans]
            most = min(offer.network_gb_per_s for offer in ends) * 1e9 / size
            if tokens > most * (1 + TOLERANCE):
                yield f"{edge}: {tokens:.1f} tokens/s, the link carries {most:.1f}"


def _nodes(plan: Plan, problem: Problem, offers: Mapping[str, Offer]) -> Iterator[str]:
    """What enters leaves, and no node computes more than its kind was measured to."""
    flows = plan.flow_tokens_per_s
    for span in plan.spans:
        entering = sum(tokens for (_, end), tokens in flows.items() if end == span.node)
        leaving = sum(tokens for (start, _), tokens in flows.items() if start == span.node)
        if abs(entering - leaving) > TOLERANCE * max(1.0, entering):
            yield f"{span.node}: {entering:.3f} tokens/s enter, {leaving:.3f} leave"
        if isinstance(problem.profile, LayerTimes):
            most = _most_tokens_per_s(span, offers[offer_of(span.node)], problem.profile)
            if entering > most * (1 + TOLERANCE):
                layers = span.stop - span.start
                what = f"{span.node}: {entering:.1f} tokens/s through {layers} layers"
                yield f"{what}, it was measured to do {most:.1f}"


def _most_tokens_per_s(span: LayerSpan, offer: Offer, times: LayerTimes) -> float:
    """Over all batches, memory aside: an upper limit."""
    node = offer.kind if offer.count == 1 else f"{offer.kind}x{offer.count}"
    layers = span.stop - span.start
    most = 0.0
    for batch in BATCHES:
        most = max(most, batch / (layers * times.layer_s(node, "decode", batch)))
    return most
