"""What no layout of layer spans can exceed, whatever its links.

For a flow F every layer is covered by nodes whose rates sum to F at least, and a node that holds l
layers serves each of them with 1/l of itself. So a *pattern* (a multiset of stages at given numbers
of layers whose rates reach F) is bought for each layer, in fractions; whether the nodes suffice for
all layers is a linear program over patterns, solved by column generation. Pricing a pattern is a
covering knapsack, solved on a grid with rates rounded up, so the bound stays valid. This holds for
partial inference too, and it contains the simpler bound by total capacity (`capacity_bound`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from autoscale.placement.spans_layout import SpanProblem

Floats = NDArray[np.float64]
GRID = 1500
ROUNDS = 60
SLACK = 1e-9


@dataclass(frozen=True)
class Items:
    """Stages at numbers of layers: of each its pool, rate, and accelerators per layer served."""

    pools: NDArray[np.int64]
    rates: Floats
    shares: Floats

    @staticmethod
    def of(problem: SpanProblem) -> "Items":
        rows = [
            (problem.pool_of(number), rate, stage.tensor / held)
            for number, stage in enumerate(problem.stages)
            for held, rate in enumerate(stage.tokens_per_s[: problem.layers], 1)
        ]
        pools, rates, shares = zip(*rows, strict=True)
        return Items(np.array(pools), np.array(rates), np.array(shares))


def room(problem: SpanProblem) -> Floats:
    """Accelerators of each pool."""
    return np.array([float(pool.total_accelerators) for pool in problem.pools])


def capacity_bound(problem: SpanProblem) -> float:
    """Tokens per second: the largest F with F * layers <= the sum over accelerators of the most
    layers times rate, a rate counting up to F only."""
    items, have = Items.of(problem), room(problem)

    def served(flow: float) -> float:
        worth = np.minimum(items.rates, flow) / items.shares
        return float(
            sum(have[k] * worth[items.pools == k].max(initial=0.0) for k in range(len(have)))
        )

    def reaches(flow: float) -> bool:
        return served(flow) >= flow * problem.layers * (1 - 1e-12)

    low, high = 0.0, served(np.inf) / problem.layers
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return high


def cheapest_pattern(items: Items, flow: float, prices: Floats) -> tuple[float, list[int]]:
    """The least that covering one layer with `flow` costs at a price per accelerator of each pool,
    and the items that do it. Rates are rounded up to the grid: never more than the true cost."""
    weights = np.array([ceil(min(rate, flow) / flow * GRID - SLACK) for rate in items.rates])
    costs = prices[items.pools] * items.shares
    keep = _undominated(weights, costs)
    kept_weights, kept_costs = weights[keep], costs[keep]
    cost, chosen = np.zeros(GRID + 1), np.zeros(GRID + 1, dtype=np.int64)
    for need in range(1, GRID + 1):
        offers = kept_costs + cost[np.maximum(need - kept_weights, 0)]
        best = int(offers.argmin())
        cost[need], chosen[need] = offers[best], best
    pattern, need = [], GRID
    while need > 0:
        pattern.append(int(keep[chosen[need]]))
        need -= int(kept_weights[chosen[need]])
    return float(cost[GRID]), pattern


def _undominated(weights: NDArray[np.int64], costs: Floats) -> NDArray[np.int64]:
    """Items that no heavier one undercuts."""
    order = np.lexsort((costs, -weights))
    kept, least = [], np.inf
    for number in order:
        if costs[number] < least:
            kept.append(int(number))
            least = costs[number]
    return np.array(kept, dtype=np.int64)


def may_carry(problem: SpanProblem, flow: float) -> bool:
    """False where it is proved that no layout carries `flow` tokens a second."""
    items, have = Items.of(problem), room(problem)
    held = have > 0
    prices, columns = np.where(held, 1.0, 1e6), list[Floats]()
    for _ in range(ROUNDS):
        cost, pattern = cheapest_pattern(items, flow, prices)
        if float(have @ prices) < problem.layers * cost * (1 - SLACK):
            return False
        columns.append(_use(items, pattern, len(have)))
        solved = linprog(-np.ones(len(columns)), np.array(columns).T, have, method="highs")
        if -float(solved.fun or 0.0) >= problem.layers * (1 - SLACK):
            return True
        prices = np.where(held, np.maximum(-solved.ineqlin.marginals, 0.0) + 1e-9, 1e6)
    return True


def flow_bound(problem: SpanProblem, *, at_least: float, tolerance: float = 3e-4) -> float:
    """Tokens per second that no layout exceeds, to a relative tolerance. at_least: what one is
    known to carry."""
    high = capacity_bound(problem)
    low, least = min(at_least, high), 1e-6 * high
    while high - low > max(tolerance * high, least):
        middle = (low + high) / 2 if low > 0 else high / 2
        low, high = (middle, high) if may_carry(problem, middle) else (low, middle)
    return high


def cost_bound(problem: SpanProblem, flow: float) -> float | None:
    """USD per hour below which no choice of machines carries `flow`; None where not even all of
    them do. Lagrange: for any price of accelerators, the patterns at that price and machines bought
    where they are cheaper than it."""
    items = Items.of(problem)
    each = np.array([float(pool.accelerators) for pool in problem.pools])
    limits = np.array([float(pool.machines) for pool in problem.pools])
    usd = np.array([pool.usd_per_h for pool in problem.pools])
    if not may_carry(problem, flow):
        return None
    best, prices, columns = 0.0, np.maximum(usd / each, 1e-6), list[Floats]()
    for _ in range(ROUNDS):
        cost, pattern = cheapest_pattern(items, flow, prices)
        bound = problem.layers * cost + float(np.minimum(usd - each * prices, 0.0) @ limits)
        best = max(best, bound)
        columns.append(_use(items, pattern, len(usd)))
        value, prices = _machine_prices(problem.layers, columns, each, limits, usd)
        if value - best <= 1e-6 * max(value, 1.0):
            break
    return best


def _machine_prices(
    layers: int, columns: Sequence[Floats], each: Floats, limits: Floats, usd: Floats
) -> tuple[float, Floats]:
    """The restricted program: fractions of patterns and machines, layers left over at a penalty;
    its value and the prices of accelerators."""
    penalty = 1e3 * float((usd @ limits) + 1.0) / layers
    count = len(columns)
    objective = np.concatenate([np.zeros(count), usd, [penalty]])
    uses = np.hstack([np.array(columns).T, -np.diag(each), np.zeros((len(usd), 1))])
    covers = np.concatenate([-np.ones(count), np.zeros(len(usd)), [-1.0]])
    solved = linprog(
        objective,
        np.vstack([uses, covers]),
        np.concatenate([np.zeros(len(usd)), [-float(layers)]]),
        bounds=[(0, None)] * count + [(0, limit) for limit in limits] + [(0, layers)],
        method="highs",
    )
    return float(solved.fun or 0.0), np.maximum(-solved.ineqlin.marginals[:-1], 0.0)


def _use(items: Items, pattern: Sequence[int], pools: int) -> Floats:
    """Accelerators of each pool that a pattern takes for one layer."""
    return np.bincount(
        items.pools[list(pattern)], weights=items.shares[list(pattern)], minlength=pools
    ).astype(np.float64)
