"""Simple layouts to start from, and to compare with: equal stages (as SWARM, ICML 23, balances
them), greedy windows (as Petals, NeurIPS 23, places joining servers), a pipeline of its own for
each pool."""

from itertools import pairwise

import numpy as np

from autoscale.placement.spans_layout import Layout, SpanProblem, on_machines

Placed = tuple[int, int, int]


def largest_stages(problem: SpanProblem) -> list[int]:
    """Each machine once, whole where it can be: the stage of the most accelerators of its pool."""
    nodes = []
    for pool in problem.pools:
        mine = [n for n, stage in enumerate(problem.stages) if stage.pool == pool.name]
        if mine:
            widest = max(mine, key=lambda n: problem.stages[n].tensor)
            per_machine = pool.accelerators // problem.stages[widest].tensor
            nodes += [widest] * (pool.machines * per_machine)
    return nodes


def equal_stages(problem: SpanProblem, layers_each: int) -> Layout | None:
    """All nodes hold `layers_each` layers; each, fastest first, goes where the least capacity is.
    None where stages of that many layers do not fit everywhere or do not divide the model."""
    nodes = largest_stages(problem)
    if problem.layers % layers_each or any(
        problem.stages[n].most_layers < layers_each for n in nodes
    ):
        return None
    count = problem.layers // layers_each
    if len(nodes) < count:
        return None
    capacity = [0.0] * count
    placed: list[Placed] = []
    for stage in sorted(nodes, key=lambda n: -problem.stages[n].tokens_per_s[layers_each - 1]):
        poorest = min(range(count), key=capacity.__getitem__)
        capacity[poorest] += problem.stages[stage].tokens_per_s[layers_each - 1]
        placed.append((stage, poorest * layers_each, (poorest + 1) * layers_each))
    return on_machines(problem, placed)


def greedy_windows(problem: SpanProblem) -> Layout:
    """Each node in turn holds as many layers as fit, where the slowest layer is slowest; among
    such windows the one whose layers have least in all."""
    covered = np.zeros(problem.layers)
    placed: list[Placed] = []
    for stage in largest_stages(problem):
        held = min(problem.stages[stage].most_layers, problem.layers)
        starts = range(problem.layers - held + 1)
        start = min(
            starts, key=lambda s: (covered[s : s + held].min(), covered[s : s + held].sum())
        )
        covered[start : start + held] += problem.stages[stage].tokens_per_s[held - 1]
        placed.append((stage, start, start + held))
    return on_machines(problem, placed)


def separate_pipelines(problem: SpanProblem) -> Layout | None:
    """For each pool alone, as many pipelines of equal spans as flow most; None where no pool can
    hold the model."""
    placed: list[Placed] = []
    nodes = largest_stages(problem)
    for number in sorted(set(nodes)):
        placed += _pipelines(problem, number, nodes.count(number))
    return on_machines(problem, placed) if placed else None


def _pipelines(problem: SpanProblem, stage: int, nodes: int) -> list[Placed]:
    """The depth with the best rate times number of pipelines."""
    rates = problem.stages[stage].tokens_per_s
    depths = [
        depth
        for depth in range(1, min(nodes, problem.layers) + 1)
        if -(-problem.layers // depth) <= len(rates)
    ]
    if not depths:
        return []
    depth = max(depths, key=lambda d: rates[-(-problem.layers // d) - 1] * (nodes // d))
    cuts = [problem.layers * n // depth for n in range(depth + 1)]
    return [(stage, start, stop) for start, stop in pairwise(cuts)] * (nodes // depth)


def starts(problem: SpanProblem) -> list[Layout]:
    """All of them that exist here."""
    equal = [equal_stages(problem, held) for held in range(1, problem.layers + 1)]
    found = [*equal, greedy_windows(problem), separate_pipelines(problem)]
    return [layout for layout in found if layout is not None]
