"""The choice itself: how many machines of which pools, and how many on demand, cost least when
being short has a price. By enumeration over a few pools at the levels of the risk model, all at
once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autoscale.spot.levels import Floats, Ints


@dataclass(frozen=True)
class Choice:
    """machines[i] of pool i of the question, on_demand besides; usd_per_h for all of them. short:
    chance that fewer than needed are left at the end of the horizon."""

    machines: tuple[int, ...]
    on_demand: int
    usd_per_h: float
    short: float


Table = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Question:
    """levels: machines of each level, from 0. kept (pools x asked x kept): chances of what is left
    of each holding. usd_per_h, region: of each pool. extra_usd_per_h (pools x asked): what asking
    so many costs beyond the price. together: chance that a pool goes with another of its region.
    short_usd_per_h: what being short is worth avoiding."""

    need: int
    levels: tuple[int, ...]
    kept: Table
    usd_per_h: tuple[float, ...]
    regions: tuple[str, ...]
    extra_usd_per_h: tuple[tuple[float, ...], ...]
    together: float
    on_demand_usd_per_h: float
    short_usd_per_h: float


@lru_cache(maxsize=4096)
def choose(question: Question) -> Choice:
    """The cheapest of all combinations; of equals the one with fewest machines. Equal questions, of
    which a quiet market asks many, are answered once."""
    q, pools, extras = question, len(question.usd_per_h), np.array(question.extra_usd_per_h)
    asked, below = _below(q.kept, q.levels, q.regions, q.together)
    machines = np.array(q.levels)[asked]
    cost = machines @ np.array(q.usd_per_h)
    for pool in range(pools):
        cost = cost + extras[pool, asked[:, pool]]
    on_demand = np.arange(q.need + 1)
    short = below[:, np.clip(q.need - on_demand, 0, below.shape[1] - 1)]
    total = cost[:, None] + on_demand * q.on_demand_usd_per_h + q.short_usd_per_h * short
    row, extra = np.unravel_index(int(np.argmin(np.round(total, 9))), total.shape)
    paid = machines[row] @ np.array(q.usd_per_h) + extra * q.on_demand_usd_per_h
    return Choice(
        tuple(int(count) for count in machines[row]),
        int(extra),
        float(paid),
        float(short[row, extra]),
    )


@lru_cache(maxsize=4)
def _below(
    kept: Table, levels: tuple[int, ...], regions: tuple[str, ...], together: float
) -> tuple[Ints, Floats]:
    """Every combination (combinations x pools), and the chances that fewer than 0, 1, ... machines
    are left of it. The same for every need, and a load changes more often than a market."""
    asked = np.indices((len(levels),) * len(kept)).reshape(len(kept), -1).T
    left = left_distribution(asked, np.array(kept), np.array(levels), regions, together)
    return asked, np.concatenate([np.zeros((len(asked), 1)), np.cumsum(left, axis=1)], axis=1)


def left_distribution(
    asked: Ints, kept: Floats, levels: Ints, regions: Sequence[str], together: float
) -> Floats:
    """combinations x machines left in all: its chances. Pools lose machines on their own, but with
    the chance of a shock in a region all of its pools do at once."""
    alone = _convolved(kept, levels)
    shocked = np.zeros_like(alone)
    weight = np.zeros(len(asked))
    for region in dict.fromkeys(regions):
        inside = [pool for pool, name in enumerate(regions) if name == region]
        if len(inside) < 2 or together == 0:
            continue
        struck = kept.copy()
        losing = np.zeros((len(asked), len(inside)))
        for column, pool in enumerate(inside):
            struck[pool] = _given_loss(kept[pool])
            rows = asked[:, pool]
            losing[:, column] = np.where(rows > 0, 1 - kept[pool, rows, rows], 0.0)
        used = (asked[:, inside] > 0).sum(1)
        chance = np.where(used > 1, together * losing.sum(1) / np.maximum(used, 1), 0.0)
        shocked += chance[:, None] * _convolved(struck, levels)
        weight += chance
    return np.asarray((1 - weight)[:, None] * alone + shocked)


def _given_loss(kept: Floats) -> Floats:
    """asked x kept, given that something is lost."""
    out = kept.copy()
    for asked in range(1, len(kept)):
        out[asked, asked] = 0
        total = out[asked].sum()
        out[asked] = out[asked] / total if total > 0 else kept[asked]
    return out


def _convolved(kept: Floats, levels: Ints) -> Floats:
    """The distribution of the sum over pools of what is left, for every combination: built up pool
    by pool, the last one running fastest, as np.indices counts."""
    width = 1 + int(levels[-1]) * len(kept)
    out = np.zeros((1, width))
    out[0, 0] = 1
    for chances in kept:
        shifted = np.zeros((len(out), width, len(levels)))
        for place, count in enumerate(levels):
            shifted[:, int(count) :, place] = out[:, : width - int(count)]
        out = np.moveaxis(shifted @ chances.T, 2, 1).reshape(-1, width)
    return np.asarray(out)
