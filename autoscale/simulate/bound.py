"""What a schedule that knows the whole trace would pay for the need, always met: the floor under
every policy. With cold starts (a machine answers one step after it is bought), and without.

Where each pool has either nothing or enough for the whole need, all replicas move as one and a
dynamic programme over (step, pool) is exact. Otherwise a linear programme over machines held and
answering gives a bound that no schedule undercuts.
"""

from typing import Any, cast

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from autoscale.simulate.market import Market
from autoscale.spot.levels import Floats


def bound_without_starts(market: Market, need: int) -> float:
    """Cost as a share of all on-demand, when machines answer at once: the cheapest of each step."""
    return float(np.mean(_cheapest(market, need)) / (need * _on_demand(market)))


def bound(market: Market, need: int) -> float:
    """Cost as a share of all on-demand, when a machine answers a step after it was bought."""
    capacity = market.capacity
    whole = bool(((capacity == 0) | (capacity >= need)).all())
    cost = _together(market, need) if whole else _linear(market, need)
    return cost / (market.steps * need * _on_demand(market))


def _on_demand(market: Market) -> float:
    return min(offer.usd_per_h for offer in market.offers if offer.market == "on_demand")


def _cheapest(market: Market, need: int) -> Floats:
    """Dollars per hour of the cheapest machines in each step."""
    order = sorted(range(len(market.spot)), key=lambda pool: market.spot[pool].usd_per_h)
    left = np.full(market.steps, float(need))
    paid = np.zeros(market.steps)
    for pool in order:
        taken = np.minimum(left, market.capacity[:, pool])
        paid += taken * market.spot[pool].usd_per_h
        left -= taken
    return np.asarray(paid + left * _on_demand(market))


def _together(market: Market, need: int) -> float:
    """The programme: least cost of answering from each pool at each step. Moving pays the new pool
    for the step before as well, and needs it to be there then. The last column is on demand."""
    there = np.concatenate([market.capacity > 0, np.ones((market.steps, 1), bool)], axis=1)
    price = np.array([*(offer.usd_per_h for offer in market.spot), _on_demand(market)]) * need
    best = np.where(there[0], price, np.inf)  # the first step answers for free: nobody is ready
    for step in range(1, market.steps):
        both = there[step] & there[step - 1]
        moved = best.min() + price  # at the step before, paid beside the one that answered
        best = np.where(both, np.minimum(best, moved) + price, np.inf)
    return float(best.min())


def _linear(market: Market, need: int) -> float:
    """held[t, p] <= capacity, answering[t, p] <= held[t - 1, p] and held[t, p], sum of answering >=
    need; the least cost of held. Columns: held, then answering, both step-major."""
    steps, pools = market.steps, len(market.spot) + 1
    size = steps * pools
    price = np.array([*(offer.usd_per_h for offer in market.spot), _on_demand(market)])
    rows, columns, values, limits, row = [], [], [], [], 0
    places = np.arange(size)
    later = places[pools:]
    for held in (later, later - pools):  # answering - held <= 0
        here = row + np.arange(len(later))
        rows += [here, here]
        columns += [size + later, held]
        values += [np.ones(len(later)), -np.ones(len(later))]
        limits.append(np.zeros(len(later)))
        row += len(later)
    rows.append(row + np.arange(len(later)) // pools)  # -sum answering <= -need
    columns.append(size + later)
    values.append(-np.ones(len(later)))
    limits.append(np.full(steps - 1, -float(need)))
    row += steps - 1
    matrix = csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(row, 2 * size),
    )
    most = np.concatenate([market.capacity, np.full((steps, 1), need)], axis=1).astype(float)
    upper = np.concatenate([np.minimum(most, 2 * need).ravel(), np.full(size, float(need))])
    found = cast(Any, linprog)(  # its types know dense matrices alone
        np.concatenate([np.tile(price, steps), np.zeros(size)]),
        A_ub=matrix,
        b_ub=np.concatenate(limits),
        bounds=np.stack([np.zeros(2 * size), upper], axis=1),
        method="highs",
    )
    assert found.success, found.message
    return float(found.fun)
