"""Local search over layouts with the true max-flow, where links bind or spans may overlap."""

import time
from dataclasses import replace
from math import exp

import numpy as np

from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_starts import largest_stages
from autoscale.placement.spans_layout import Layout, Node, SpanProblem, on_machines, rate


def improve(
    problem: SpanProblem, start: Layout, *, deadline: float, seed: int = 0, enough: float
) -> tuple[Layout, float]:
    """Simulated annealing from `start` until `deadline` (time.monotonic) or a flow of `enough`:
    a node moves, grows or takes another's span, two change places, a boundary shifts. Returns the
    best layout seen and its tokens per second."""
    random = np.random.default_rng(seed)
    nodes = _with_idle(problem, start)
    now = _score(problem, nodes)
    best, best_flow = nodes, layout_flow(problem, Layout(tuple(nodes))).tokens_per_s
    began = time.monotonic()
    while time.monotonic() < deadline and best_flow < enough * (1 - 1e-6):
        warmth = 0.05 * max(now[0], enough / 10) * (deadline - time.monotonic())
        warmth /= max(deadline - began, 1e-9)
        tried = _move(problem, nodes, random)
        score = _score(problem, tried)
        loss = (now[0] - score[0]) + 0.05 * (now[1] - score[1])
        if loss <= 0 or random.random() < exp(-loss / max(warmth, 1e-9)):
            nodes, now = tried, score
            if score[0] > best_flow * (1 + 1e-9):
                best, best_flow = tried, score[0]
    return Layout(tuple(best)), best_flow


def _with_idle(problem: SpanProblem, start: Layout) -> list[Node]:
    """The layout with machines that it leaves out, each holding the first layer."""
    used = {node.machine for node in start.nodes}
    rest = on_machines(problem, [(stage, 0, 1) for stage in largest_stages(problem)])
    return [*start.nodes, *[node for node in rest.nodes if node.machine not in used]]


def _score(problem: SpanProblem, nodes: list[Node]) -> tuple[float, float]:
    """The flow, and a guide on plateaus: the mean capacity over layers, counted up to twice the
    flow, so that thin layers are filled first."""
    flow = layout_flow(problem, Layout(tuple(nodes))).tokens_per_s
    covered = np.zeros(problem.layers)
    for node in nodes:
        covered[node.start : node.stop] += rate(problem, node)
    ceiling = 2 * flow if flow > 0 else float(covered.mean())
    return flow, float(np.minimum(covered, ceiling).mean())


def _move(problem: SpanProblem, nodes: list[Node], random: np.random.Generator) -> list[Node]:
    tried = list(nodes)
    n, kind = int(random.integers(len(nodes))), int(random.integers(5))
    if kind == 0:
        tried[n] = _anywhere(problem, nodes[n], random)
    elif kind == 1:
        tried[n] = _resized(problem, nodes[n], random)
    elif kind == 2:
        other = nodes[int(random.integers(len(nodes)))]
        tried[n] = _fitted(problem, nodes[n], other.start, other.stop)
    elif kind == 3:
        m = int(random.integers(len(nodes)))
        tried[n] = _fitted(problem, nodes[n], nodes[m].start, nodes[m].stop)
        tried[m] = _fitted(problem, nodes[m], nodes[n].start, nodes[n].stop)
    else:
        tried = _shifted(problem, nodes, nodes[n].stop, 1 if random.random() < 0.5 else -1)
    return tried


def _anywhere(problem: SpanProblem, node: Node, random: np.random.Generator) -> Node:
    most = min(problem.stages[node.stage].most_layers, problem.layers)
    held = int(random.integers(1, most + 1))
    start = int(random.integers(0, problem.layers - held + 1))
    return replace(node, start=start, stop=start + held)


def _resized(problem: SpanProblem, node: Node, random: np.random.Generator) -> Node:
    step = 1 if random.random() < 0.5 else -1
    if random.random() < 0.5:
        return _fitted(problem, node, node.start + step, node.stop)
    return _fitted(problem, node, node.start, node.stop + step)


def _fitted(problem: SpanProblem, node: Node, start: int, stop: int) -> Node:
    """The node at a span, as it was where the span does not exist or does not fit."""
    most = problem.stages[node.stage].most_layers
    if 0 <= start < stop <= problem.layers and stop - start <= most:
        return replace(node, start=start, stop=stop)
    return node


def _shifted(problem: SpanProblem, nodes: list[Node], boundary: int, step: int) -> list[Node]:
    """All spans that meet at a boundary meet one layer further."""
    if not 0 < boundary < problem.layers:
        return nodes
    return [
        _fitted(
            problem,
            node,
            node.start + step * (node.start == boundary),
            node.stop + step * (node.stop == boundary),
        )
        for node in nodes
    ]
