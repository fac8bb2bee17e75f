"""Good layouts where links do not bind, from blocks of layers that repeat.

A *block* is so many consecutive layers with nodes that pass a flow F through them: nodes side by
side, each over all of its layers, and blocks in a row, nested as they come (a series-parallel
layout). The cheapest block of each length at given prices of accelerators comes out of one dynamic
program; prices come from the linear program that puts blocks in a row until all layers are covered
(column generation), and an integer program picks the blocks. Nodes that are alike stay a number
throughout, so a hundred nodes cost no more than ten."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from autoscale.placement.flow_bound import room
from autoscale.placement.spans_layout import SpanProblem

Floats = NDArray[np.float64]
GRID = 300
ROUNDS = 24
Placed = tuple[int, int, int]  # stage, start, stop


@dataclass(frozen=True)
class Block:
    """Nodes over `layers` layers, counted from the block's first, and accelerators of each pool."""

    layers: int
    placed: tuple[Placed, ...]
    use: tuple[int, ...]


@dataclass(frozen=True)
class _Table:
    """cost[b][q]: of carrying q grid steps through b layers; how: the stage added, or -1 - the
    length of the first of two blocks in a row."""

    cost: list[list[float]]
    how: list[list[int]]
    weights: list[list[int]]  # of each stage by layers held, in grid steps, rounded down


def _table(problem: SpanProblem, flow: float, prices: Floats, most: int, grid: int) -> _Table:
    costs = [prices[problem.pool_of(n)] * s.tensor for n, s in enumerate(problem.stages)]
    weights = [
        [0] + [int(min(rate, flow) / flow * grid + 1e-9) for rate in stage.tokens_per_s]
        for stage in problem.stages
    ]
    table = _Table([[0.0] * (grid + 1)], [[0] * (grid + 1)], weights)
    for layers in range(1, most + 1):
        options = [
            (weight[layers], float(costs[n]), n)
            for n, weight in enumerate(weights)
            if layers < len(weight) and weight[layers] > 0
        ]
        split_cost, split_how = _splits(table, layers, grid)
        cost, how = [0.0] * (grid + 1), [0] * (grid + 1)
        for need in range(1, grid + 1):
            least, chosen = split_cost[need], split_how[need]
            for weight, price, n in options:
                offer = price + (cost[need - weight] if need > weight else 0.0)
                if offer < least - 1e-12:
                    least, chosen = offer, n
            cost[need], how[need] = least, chosen
        table.cost.append(cost)
        table.how.append(how)
    return table


def _splits(table: _Table, layers: int, grid: int) -> tuple[list[float], list[int]]:
    """The best two blocks in a row for each need."""
    least, how = np.full(grid + 1, np.inf), np.zeros(grid + 1, dtype=np.int64)
    for first in range(1, layers // 2 + 1):
        both = np.array(table.cost[first]) + np.array(table.cost[layers - first])
        better = both < least - 1e-12
        least[better], how[better] = both[better], -1 - first
    return least.tolist(), how.tolist()


def _read(table: _Table, layers: int, need: int, start: int, placed: list[Placed]) -> None:
    """The nodes of the cheapest block, from `start` on."""
    while need > 0:
        how = table.how[layers][need]
        if how < 0:
            first = -1 - how
            _read(table, first, need, start, placed)
            _read(table, layers - first, need, start + first, placed)
            return
        placed.append((how, start, start + layers))
        need -= table.weights[how][layers]


def _blocks(problem: SpanProblem, table: _Table, grid: int) -> list[Block]:
    found = []
    for layers in range(1, len(table.cost)):
        if np.isfinite(table.cost[layers][grid]):
            placed: list[Placed] = []
            _read(table, layers, grid, 0, placed)
            use = [0] * len(problem.pools)
            for stage, _, _ in placed:
                use[problem.pool_of(stage)] += problem.stages[stage].tensor
            found.append(Block(layers, tuple(placed), tuple(use)))
    return found


class BlockPool:
    """All blocks found for one problem and flow, and what is made of them."""

    def __init__(
        self, problem: SpanProblem, flow: float, *, seed: int = 0, grid: int = GRID
    ) -> None:
        self._problem, self._flow, self._grid = problem, flow, grid
        self._most = min(problem.layers, max(s.most_layers for s in problem.stages))
        self._random = np.random.default_rng(seed)
        self._blocks: dict[tuple[int, tuple[int, ...]], Block] = {}

    def cover(self, deadline: float) -> list[Placed] | None:
        """Nodes within the pools that carry the flow through all layers; None if none was found
        before `deadline` (time.monotonic)."""
        have = room(self._problem)
        prices, covered = np.ones(len(have)), 0.0
        for number in range(ROUNDS):
            self._price(prices, have, noisy=number % 2 == 1)
            blocks = list(self._blocks.values())
            if blocks:
                uses, lengths = _matrices(blocks)
                solved = linprog(-lengths, uses, have, method="highs")
                prices = np.maximum(-solved.ineqlin.marginals, 0.0)
                now = -float(solved.fun or 0.0)
                stuck = number > 3 and number % 2 == 0 and now - covered < 1e-4
                covered = now
                if stuck and covered < self._problem.layers:
                    return None
            if time.monotonic() > deadline:
                break
        if covered < self._problem.layers * (1 - 1e-9):
            return None
        return self._pick(prices, have, deadline)

    def buy(self, deadline: float) -> tuple[list[Placed], list[int]] | None:
        """As `cover`, with the cheapest machines: the nodes and machines of each pool."""
        problem = self._problem
        usd = np.array([pool.usd_per_h for pool in problem.pools])
        each = np.array([float(pool.accelerators) for pool in problem.pools])
        have = room(problem)
        prices = usd / each + 1e-9
        for number in range(ROUNDS):
            self._price(prices, have, noisy=number % 2 == 1)
            if time.monotonic() > deadline:
                break
            solved = self._relaxed(usd, each)
            if solved is not None:
                prices = solved
        return self._pick_machines(usd, each, deadline)

    def _price(self, prices: Floats, have: Floats, *, noisy: bool) -> None:
        noise = self._random.normal(0.0, 0.1, len(prices)) if noisy else np.zeros(len(prices))
        asked = prices * np.exp(noise) + 1e-6
        table = _table(self._problem, self._flow, asked, self._most, self._grid)
        for block in _blocks(self._problem, table, self._grid):
            if all(used <= most for used, most in zip(block.use, have, strict=True)):
                self._blocks.setdefault((block.layers, block.use), block)

    def _pick(self, prices: Floats, have: Floats, deadline: float) -> list[Placed] | None:
        blocks = list(self._blocks.values())
        uses, lengths = _matrices(blocks)
        layers = float(self._problem.layers)
        solved = milp(
            uses.T @ prices,
            constraints=[
                LinearConstraint(uses, -np.inf, have),
                LinearConstraint(lengths[None], layers, layers),
            ],
            integrality=np.ones(len(blocks), dtype=np.int64),
            options={"time_limit": _left(deadline), "mip_rel_gap": 10.0},
        )
        return None if solved.x is None else in_a_row(blocks, solved.x)

    def _relaxed(self, usd: Floats, each: Floats) -> Floats | None:
        """Prices of accelerators from the program of `buy` in fractions."""
        program = self._machine_program(usd, each)
        if program is None:
            return None
        objective, matrix, low, high, upper = program
        equal = low == high
        solved = linprog(
            objective,
            matrix[~equal],
            high[~equal],
            matrix[equal],
            high[equal],
            [(0, most) for most in upper],
            method="highs",
        )
        if solved.x is None:
            return None
        return np.maximum(-solved.ineqlin.marginals, 0.0)

    def _pick_machines(
        self, usd: Floats, each: Floats, deadline: float
    ) -> tuple[list[Placed], list[int]] | None:
        program = self._machine_program(usd, each)
        if program is None:
            return None
        objective, matrix, low, high, upper = program
        solved = milp(
            objective,
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.ones(len(objective), dtype=np.int64),
            bounds=Bounds(0, upper),
            options={"time_limit": _left(deadline)},
        )
        if solved.x is None:
            return None
        count, values = len(self._blocks), np.asarray(solved.x, dtype=np.float64)
        placed = in_a_row(list(self._blocks.values()), values[:count])
        return placed, [round(machines) for machines in values[count:].tolist()]

    def _machine_program(
        self, usd: Floats, each: Floats
    ) -> tuple[Floats, Floats, Floats, Floats, Floats] | None:
        """Objective, matrix, least, most and upper bounds over blocks and machines."""
        blocks = list(self._blocks.values())
        if not blocks:
            return None
        uses, lengths = _matrices(blocks)
        pools, layers = len(usd), float(self._problem.layers)
        matrix = np.zeros((pools + 1, len(blocks) + pools))
        matrix[:pools, : len(blocks)] = uses
        matrix[:pools, len(blocks) :] = -np.diag(each)
        matrix[pools, : len(blocks)] = lengths
        limits = [float(pool.machines) for pool in self._problem.pools]
        return (
            np.concatenate([np.zeros(len(blocks)), usd]),
            matrix,
            np.array([-np.inf] * pools + [layers]),
            np.array([0.0] * pools + [layers]),
            np.array([layers] * len(blocks) + limits),
        )


def in_a_row(blocks: Sequence[Block], counts: Floats) -> list[Placed]:
    """Blocks one after the other, each as often as said."""
    placed, start = [], 0
    for block, count in zip(blocks, counts, strict=True):
        for _ in range(round(count)):
            placed += [(stage, start + a, start + b) for stage, a, b in block.placed]
            start += block.layers
    return placed


def _matrices(blocks: Sequence[Block]) -> tuple[Floats, Floats]:
    uses = np.array([block.use for block in blocks], dtype=np.float64).T
    return uses, np.array([float(block.layers) for block in blocks])


def _left(deadline: float) -> float:
    return max(0.05, deadline - time.monotonic())
