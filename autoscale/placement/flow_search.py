"""Local search over layouts with the true max-flow, where links bind or spans may overlap."""

import time
from dataclasses import dataclass, replace
from math import exp

import numpy as np

from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_starts import largest_stages
from autoscale.placement.spans_layout import Layout, Node, SpanProblem, on_machines, rate

ROUNDS = 12
SWAPS, MOVES = (3,), (0, 1, 2, 3, 4)
WARMTH = 0.05  # of the flow, at the beginning of a round


def improve(
    problem: SpanProblem, start: Layout, *, deadline: float, seed: int = 0, enough: float
) -> tuple[Layout, float]:
    """Simulated annealing until `deadline` (time.monotonic) or a flow of `enough`. Rounds begin at
    `start`, where nodes only change places, and at the best so far, where a node also moves, grows
    or takes another's span and boundaries shift, in turns. Returns the best layout seen and its
    tokens per second."""
    random = np.random.default_rng(seed)
    nodes = _with_idle(problem, start)
    best = nodes, layout_flow(problem, Layout(tuple(nodes))).tokens_per_s
    for number in range(ROUNDS):
        now = time.monotonic()
        if now >= deadline or best[1] >= enough * (1 - 1e-6):
            break
        until = now + (deadline - now) / (ROUNDS - number)
        begin, moves = (nodes, SWAPS) if number % 2 == 0 else (best[0], MOVES)
        round_ = _Round(until, enough, moves)
        best = max(best, _anneal(problem, begin, round_, random), key=lambda pair: pair[1])
    return Layout(tuple(best[0])), best[1]


@dataclass(frozen=True)
class _Round:
    deadline: float
    enough: float
    moves: tuple[int, ...]


def _anneal(
    problem: SpanProblem, nodes: list[Node], limits: _Round, random: np.random.Generator
) -> tuple[list[Node], float]:
    """One round: warmth falls linearly to nothing at the deadline."""
    now = _score(problem, nodes)
    best, best_flow, began = nodes, now[0], time.monotonic()
    span_s = max(limits.deadline - began, 1e-9)
    while time.monotonic() < limits.deadline and best_flow < limits.enough * (1 - 1e-6):
        left = (limits.deadline - time.monotonic()) / span_s
        warmth = WARMTH * max(now[0], limits.enough / 10) * left
        tried = _move(problem, nodes, random, limits.moves)
        score = _score(problem, tried)
        loss = (now[0] - score[0]) + 0.05 * (now[1] - score[1])
        if loss <= 0 or random.random() < exp(-loss / max(warmth, 1e-9)):
            nodes, now = tried, score
            if score[0] > best_flow * (1 + 1e-9):
                best, best_flow = tried, score[0]
    return best, best_flow


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


def _move(
    problem: SpanProblem, nodes: list[Node], random: np.random.Generator, moves: tuple[int, ...]
) -> list[Node]:
    tried = list(nodes)
    n, kind = int(random.integers(len(nodes))), moves[int(random.integers(len(moves)))]
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
