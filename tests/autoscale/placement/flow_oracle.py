"""Every layout of a small problem tried, each with SciPy's max-flow on integer capacities, and
random small problems."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from math import comb, inf, prod

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from autoscale.placement.spans_layout import Links, Pool, SpanProblem, Stage

FREE = 10**8
Choice = tuple[tuple[int, int, int], ...]  # of one machine: (stage, start, stop) of its nodes


def choices(problem: SpanProblem, pool: Pool) -> list[Choice]:
    """What one machine can be."""
    found: list[Choice] = []
    for number, stage in enumerate(problem.stages):
        if stage.pool != pool.name:
            continue
        spans = [
            (number, start, start + held)
            for held in range(1, min(stage.most_layers, problem.layers) + 1)
            for start in range(problem.layers - held + 1)
        ]
        found += combinations_with_replacement(spans, pool.accelerators // stage.tensor)
    return found


def size(problem: SpanProblem) -> int:
    """How many layouts `best` would try."""
    if problem.links.pairs:
        return prod(len(choices(problem, pool)) ** pool.machines for pool in problem.pools)
    return prod(
        comb(len(choices(problem, pool)) + pool.machines - 1, pool.machines)
        for pool in problem.pools
    )


def layouts(problem: SpanProblem) -> Iterator[list[tuple[str, int, int, int]]]:
    """(machine, stage, start, stop) of all nodes; machines alike are not told apart unless links
    do."""
    per_pool = []
    for pool in problem.pools:
        options = choices(problem, pool)
        if problem.links.pairs:
            per_pool.append(list(product(options, repeat=pool.machines)))
        else:
            per_pool.append(list(combinations_with_replacement(options, pool.machines)))
    for combination in product(*per_pool):
        yield [
            (pool.machine(index), *node)
            for pool, machines in zip(problem.pools, combination, strict=True)
            for index, choice in enumerate(machines)
            for node in choice
        ]


def flow(problem: SpanProblem, nodes: list[tuple[str, int, int, int]]) -> int:
    """By SciPy: vertices 0 source, 1 sink, then two for each node."""
    edges = []
    for a, (machine, stage, start, stop) in enumerate(nodes):
        pace = int(problem.stages[stage].tokens_per_s[stop - start - 1])
        edges.append((2 + 2 * a, 3 + 2 * a, pace))
        if start == 0:
            edges.append((0, 2 + 2 * a, _whole(problem.links.enter)))
        if stop == problem.layers:
            edges.append((3 + 2 * a, 1, _whole(problem.links.leave)))
        for b, (other, _, other_start, other_stop) in enumerate(nodes):
            if stop == other_start or (problem.partial and other_start < stop < other_stop):
                edges.append((3 + 2 * a, 2 + 2 * b, _whole(problem.links.rate(machine, other))))
    tails, heads, rooms = zip(*edges, strict=True)
    vertices = 2 + 2 * len(nodes)
    graph = csr_array((np.array(rooms, np.int32), (tails, heads)), shape=(vertices, vertices))
    return int(maximum_flow(graph, 0, 1).flow_value)


def best(problem: SpanProblem) -> int:
    """The largest flow of any layout."""
    return max(flow(problem, nodes) for nodes in layouts(problem))


def cheapest(problem: SpanProblem, tokens_per_s: float) -> float:
    """The least cost of machines that carry tokens_per_s, over every number of each; inf if
    none."""
    least = inf
    for machines in product(*(range(pool.machines + 1) for pool in problem.pools)):
        usd = sum(n * p.usd_per_h for n, p in zip(machines, problem.pools, strict=True))
        if usd < least and any(machines):
            pools = tuple(
                Pool(p.name, n, p.accelerators, p.usd_per_h)
                for n, p in zip(machines, problem.pools, strict=True)
            )
            part = SpanProblem(problem.layers, pools, problem.stages, problem.links)
            if best(part) >= tokens_per_s:
                least = usd
    return least


def random_problem(random: np.random.Generator, *, most_layouts: int = 2500) -> SpanProblem:
    """2 to 5 machines of 1 to 3 pools, 2 to 6 layers; links that bind, partial inference and
    several tensor degrees in some."""
    while True:
        problem = _random_problem(random)
        if size(problem) <= most_layouts:
            return problem


def _random_problem(random: np.random.Generator) -> SpanProblem:
    layers, count = int(random.integers(2, 7)), int(random.integers(1, 4))
    machines = random.multinomial(random.integers(2, 6), np.ones(count) / count)
    pools, stages = [], []
    for number in range(count):
        double = random.random() < 0.25
        prices = int(random.integers(1, 9))
        pools.append(Pool(f"p{number}", int(machines[number]), 1 + double, float(prices)))
        base, most = int(random.integers(20, 100)), int(random.integers(1, layers + 1))
        for tensor in (1, 2) if double else (1,):
            speed = base if tensor == 1 else int(base * 1.7)
            stages.append(
                Stage(f"p{number}", _rates(random, speed, min(layers, most * tensor)), tensor)
            )
    return SpanProblem(
        layers, tuple(pools), tuple(stages), _links(random, pools), random.random() < 0.3
    )


def _rates(random: np.random.Generator, base: int, most: int) -> tuple[float, ...]:
    """About base / l, with noise of a tenth, so that a table may rise here and there."""
    return tuple(
        float(max(1, int(base / held * random.uniform(0.9, 1.1)))) for held in range(1, most + 1)
    )


def _links(random: np.random.Generator, pools: list[Pool]) -> Links:
    kind = random.random()
    if kind < 0.5:
        return Links()
    between = float(random.integers(5, 60))
    if kind < 0.75:
        return Links(between=between)
    names = [pool.machine(n) for pool in pools for n in range(pool.machines)]
    pairs = {
        (a, b): float(random.integers(0, 40))
        for a in names
        for b in names
        if a != b and random.random() < 0.4
    }
    return Links(between=between, pairs=pairs)


def _whole(rate: float) -> int:
    return FREE if rate == inf else int(rate)
