"""Which throughput tables agree with Melange's published figures? Its tables are not published, but
for each size of request the figures say which GPU is best per dollar and by how much, and for the
Arena data set how many GPUs of one kind, and which mix of kinds, serve 1, 2 and 4 requests/s.

With w_b, what bucket b asks of its best GPU in dollars, all of that is linear in w: load on GPU g
is w_b v_bg / price_g, where v_bg >= 1 says how much worse g is. The figures leave v a polytope;
splitting w_b over its corners covers every table (so an infeasible program proves that there is
none), and that a cheaper count cannot carry the load has a proof by weights (the dual), found and
used in turns.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]
KINDS = ("H100", "A100", "A10G", "L4")
HALF = 0.5  # the figures round to whole percents
ROUNDS = 12
LEAST_WEIGHT = 0.2  # of a price: keeps a failing proof from vanishing


@dataclass(frozen=True)
class Published:
    """At this many requests/s: counts of one kind alone, and the mix that Melange chose."""

    requests_per_s: float
    alone: tuple[int, ...]
    mix: tuple[int, ...]


@dataclass(frozen=True)
class Corner:
    """One corner of what the figures allow for a size of request: how much worse each kind is than
    the best, per dollar."""

    cell: int
    input_tokens: int
    output_tokens: int
    worse: tuple[float, ...]


@dataclass(frozen=True)
class Inverse:
    """Corners with the dollars that each asks for at 1 request/s, and by how much of a machine
    every count is met; margin below 0: no table agrees."""

    corners: tuple[Corner, ...]
    weights: Floats
    margin: float
    prices: Floats

    def loads(self) -> dict[tuple[int, int], tuple[float, ...]]:
        """Machines of each kind for 1 request/s of the whole mix, by size of request."""
        every: dict[tuple[int, int], Floats] = {}
        for corner, weight in zip(self.corners, self.weights, strict=True):
            if weight > 1e-7:
                size = corner.input_tokens, corner.output_tokens
                load = weight * np.array(corner.worse) / self.prices
                every[size] = every.get(size, np.zeros(len(KINDS))) + load
        return {size: tuple(load.tolist()) for size, load in every.items()}


def published(path: Path, rates: Sequence[float] = (1, 2, 4)) -> tuple[Floats, list[Published]]:
    """Prices by kind, and the rows whose counts are exact."""
    table = json.loads(path.read_text())
    rows = []
    for row in table["rows"]:
        if row["rate_rps"] in rates:
            assert row["counts_exact"]
            l4, a10g, a100, h100 = row["candidate_allocations_L4_A10G_A100_H100"][0]
            alone = tuple(row["baseline_counts"][kind] for kind in KINDS)
            rows.append(Published(row["rate_rps"], alone, (h100, a100, a10g, l4)))
    return np.array([table["prices_usd_hr"][kind] for kind in KINDS]), rows


def corners(
    path: Path, most_input_tokens: int, *, h100_worst_at_least: bool = False
) -> list[Corner]:
    """What the grids allow, size by size. h100_worst_at_least: for the smallest request, where they
    leave open who is second, take H100 for the worst, as it is beside it."""
    grid = json.loads(path.read_text())
    every = []
    sizes = list(itertools.product(grid["outputs_tokens"], grid["inputs_tokens"][:8]))
    for cell, (outputs, inputs) in enumerate(sizes):
        row, column = grid["outputs_tokens"].index(outputs), grid["inputs_tokens"].index(inputs)
        if inputs > most_input_tokens:
            continue
        pair = grid["a10g_vs_a100_pct_positive_means_A10G"][row]
        found = _corners(
            KINDS.index(grid["llama2_7b_best_gpu"][row][column]),
            _interval(grid["best_vs_second_pct"][row][column]),
            _interval(grid["best_vs_worst_pct"][row][column]),
            _a100_over_a10g(pair[column]) if column < len(pair) else None,
        )
        if h100_worst_at_least and (inputs, outputs) == (25, 25):
            found = [worse for worse in found if worse[0] == max(worse)]
        every += [Corner(cell, inputs, outputs, worse) for worse in found]
    return every


def invert(of: Sequence[Corner], prices: Floats, rows: Sequence[Published]) -> Inverse:
    """Look for a table: counts and mixes as published, and no cheaper mix that would do."""
    worse = np.array([corner.worse for corner in of]) / prices
    cheaper = {row: _cheaper(prices, row.mix) for row in rows}
    weights, margin = _program(worse, rows, [])
    if margin < 0:
        return Inverse(tuple(of), weights, margin, prices)
    proofs = [(row, y, prices / prices.sum()) for row in rows for y in cheaper[row]]
    margin = -np.inf
    for _ in range(ROUNDS):
        before = margin
        weights, margin = _program(worse, rows, proofs)
        proofs = [
            (row, y, _proof(worse, weights, row, y, prices)) for row in rows for y in cheaper[row]
        ]
        if margin > 0 and margin - before < 1e-3:
            break
    return Inverse(tuple(of), weights, margin, prices)


def disagreeing(path: Path, found: Inverse) -> list[tuple[int, int]]:
    """Sizes of request at which the table does not show what the grids do: an independent reading,
    cell by cell, since corners of different orders of the kinds may have been mixed."""
    grid = json.loads(path.read_text())
    wrong = []
    for (inputs, outputs), load in found.loads().items():
        row, column = grid["outputs_tokens"].index(outputs), grid["inputs_tokens"].index(inputs)
        usd = np.array(load) * found.prices
        over = np.sort(100 * (usd / usd.min() - 1))
        said = grid["best_vs_second_pct"][row][column], grid["best_vs_worst_pct"][row][column]
        best = KINDS[int(usd.argmin())] == grid["llama2_7b_best_gpu"][row][column]
        near = all(
            abs(a - b) <= HALF + 1e-6 for a, b in zip((over[1], over[-1]), said, strict=True)
        )
        pair = grid["a10g_vs_a100_pct_positive_means_A10G"][row][column]
        ratio = usd[1] / usd[2] if pair > 0 else usd[2] / usd[1]
        if not (best and near and abs(100 * (ratio - 1) - abs(pair)) <= HALF + 1e-6):
            wrong.append((inputs, outputs))
    return wrong


def _interval(percent: float) -> tuple[float, float]:
    return 1 + (percent - HALF) / 100, 1 + (percent + HALF) / 100


def _a100_over_a10g(percent: float) -> tuple[float, float]:
    """How much worse A100 is than A10G; the figure's sign says which of them is better."""
    low, high = _interval(abs(percent))
    return (low, high) if percent > 0 else (1 / high, 1 / low)


def _corners(
    best: int,
    second: tuple[float, float],
    worst: tuple[float, float],
    pair: tuple[float, float] | None,
) -> list[tuple[float, ...]]:
    """Corners of all (worse by kind) with that best, some second, some worst, and the known ratio
    of A100 and A10G."""
    a100, a10g = KINDS.index("A100"), KINDS.index("A10G")
    found: set[tuple[float, ...]] = set()
    for two, last in itertools.permutations([k for k in range(len(KINDS)) if k != best], 2):
        spans = [(second[0], worst[1])] * len(KINDS)
        spans[best], spans[two], spans[last] = (1.0, 1.0), second, worst
        if pair and best in (a100, a10g):
            other = a10g if best == a100 else a100
            low, high = pair if best == a10g else (1 / pair[1], 1 / pair[0])
            spans[other] = max(spans[other][0], low), min(spans[other][1], high)
        if any(low > high for low, high in spans):
            continue
        boxed = set(itertools.product(*spans))
        tied = pair is not None and best not in (a100, a10g)
        found |= set(_on_ratio(boxed, spans, pair, a100, a10g)) if tied and pair else boxed
    return sorted(found)


def _on_ratio(
    boxed: set[tuple[float, ...]],
    spans: Sequence[tuple[float, float]],
    pair: tuple[float, float],
    a100: int,
    a10g: int,
) -> Iterator[tuple[float, ...]]:
    """Where the edges of a box meet the two lines that bound a ratio of two of its sides."""
    for point, ratio in itertools.product(boxed, pair):
        moved = list(point)
        moved[a100] = ratio * point[a10g]
        if spans[a100][0] <= moved[a100] <= spans[a100][1]:
            yield tuple(moved)
        moved = list(point)
        moved[a10g] = point[a100] / ratio
        if spans[a10g][0] <= moved[a10g] <= spans[a10g][1]:
            yield tuple(moved)


def _cheaper(prices: Floats, mix: Sequence[int]) -> list[NDArray[np.int64]]:
    """Counts that cost less and to which nothing can be added."""
    cost = float(np.dot(prices, mix))
    ranges = [range(int(cost / price) + 1) for price in prices]
    every = [np.array(y) for y in itertools.product(*ranges) if np.dot(prices, y) < cost - 1e-9]
    return [y for y in every if not any((z >= y).all() and (z > y).any() for z in every)]


def _program(
    worse: Floats, rows: Sequence[Published], proofs: Sequence[tuple[Published, Any, Floats]]
) -> tuple[Floats, float]:
    """Dollars by corner, and the widest margin that all rows can have at once."""
    n, kinds = worse.shape
    margin = n + len(rows) * n * kinds
    lines: list[tuple[Floats, Floats, float, float]] = []
    own = np.arange(n)

    def add(columns: Any, values: Any, low: float, high: float) -> None:
        lines.append((np.atleast_1d(columns), np.atleast_1d(values), low, high))

    for at, row in enumerate(rows):
        share = n + at * n * kinds + np.arange(n * kinds).reshape(n, kinds)
        for k in range(kinds):
            load = row.requests_per_s * worse[:, k]
            add(np.r_[own, margin], np.r_[load, -1.0], row.alone[k] - 1, np.inf)
            add(np.r_[own, margin], np.r_[load, 1.0], -np.inf, row.alone[k])
            slack = np.r_[share[:, k], margin], np.r_[load, 1.0 if row.mix[k] else 0.0]
            add(*slack, -np.inf, row.mix[k])
        for b in range(n):
            add(np.r_[b, share[b]], np.r_[-1.0, np.ones(kinds)], 0, 0)
    for row, y, weights in proofs:
        least = row.requests_per_s * (weights * worse).min(axis=1)
        add(np.r_[own, margin], np.r_[least, -weights.sum()], float(weights @ y), np.inf)
    objective = np.zeros(margin + 1)
    objective[margin] = -1
    low = np.zeros(margin + 1)
    low[margin] = -np.inf
    answer = milp(objective, constraints=_system(lines, margin + 1), bounds=Bounds(low, np.inf))
    assert answer.x is not None, answer.message
    return answer.x[:n], -float(answer.fun)


def _proof(worse: Floats, weights: Floats, row: Published, y: Any, prices: Floats) -> Floats:
    """Weights on the kinds that show best why y cannot carry the load."""
    there = np.nonzero(weights > 1e-9)[0]
    m, kinds = len(there), worse.shape[1]
    lines = [(np.r_[np.arange(kinds)], np.ones(kinds), 1.0, 1.0)]
    for at, b in enumerate(there):
        for k in range(kinds):
            lines.append((np.r_[kinds + at, k], np.r_[1.0, -worse[b, k]], -np.inf, 0.0))
    answer = milp(
        np.r_[np.asarray(y, float), -row.requests_per_s * weights[there]],
        constraints=_system(lines, kinds + m),
        bounds=Bounds(np.r_[LEAST_WEIGHT * prices / prices.sum(), np.zeros(m)], np.inf),
    )
    assert answer.x is not None, answer.message
    return answer.x[:kinds]


def _system(lines: Sequence[tuple[Any, Any, float, float]], columns: int) -> LinearConstraint:
    row = np.concatenate([np.full(len(line[0]), at) for at, line in enumerate(lines)])
    column = np.concatenate([line[0] for line in lines])
    value = np.concatenate([line[1] for line in lines])
    matrix = csr_matrix((value, (row, column)), shape=(len(lines), columns))
    return LinearConstraint(matrix, [line[2] for line in lines], [line[3] for line in lines])
