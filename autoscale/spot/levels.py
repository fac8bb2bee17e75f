"""How a spot pool's capacity moves, learnt from its history: a semi-Markov chain over levels.

States are: nothing to be had (in phases of how long already), scarce (each level of its own), and
plenty (in phases of how long already). Phases double in length, so lifetimes may have any hazard
that falls with age, as those of spot machines do; censored ones count for as long as they were
seen. Drops out of plenty and returns from nothing are pooled over pools, made monotone in age, and
scaled by a factor for each pool that is shrunk towards 1 by `PRIOR_EVENTS`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PHASE_STARTS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PRIOR_EVENTS = 5.0  # how many events of its own a pool needs to be believed half
SMOOTHING = 0.5


@dataclass(frozen=True)
class Chain:
    """Pooled rates for each step of period_s.

    levels: machines from which each level counts, ascending; the last is "plenty". drop[p],
    rise[p]: chance to leave plenty / nothing in phase p. fall[l], climb[l]: where a drop from level
    l leads (levels 0..l-1), where a rise does (l+1..top). scarce[l]: chances from level l to each.
    factors (one for each pool): how often its drops come, beside the pooled ones. together: chance
    that a pool of the same region drops in the step in which one does.
    """

    pools: tuple[str, ...]
    regions: tuple[str, ...]
    levels: tuple[int, ...]
    period_s: float
    drop: Floats
    rise: Floats
    drop_to: Floats
    rise_to: Floats
    scarce: Floats
    drops: Floats  # seen in each pool
    expected: Floats  # by the pooled rates, in each pool
    together: float

    @property
    def top(self) -> int:
        return len(self.levels)

    @property
    def state_levels(self) -> Ints:
        """The level of each state: phases of nothing, scarce ones, phases of plenty."""
        phases = len(PHASE_STARTS)
        return np.array([0] * phases + [*range(1, self.top)] + [self.top] * phases)

    def matrix(self, factor: float) -> Floats:
        """Chances from state to state in one step; rows sum to 1."""
        phases, top = len(PHASE_STARTS), self.top
        size = 2 * phases + top - 1
        enter = [0, *range(phases, phases + top - 1), phases + top - 1]  # a level's first state
        out = np.zeros((size, size))
        for phase in range(phases):
            rise, drop = float(self.rise[phase]), min(0.9, float(self.drop[phase]) * factor)
            low, high = phase, phases + top - 1 + phase
            _stay(out, low, 1 - rise, phase)
            _stay(out, high, 1 - drop, phase)
            for level in range(top + 1):
                out[low, enter[level]] += rise * self.rise_to[level]
                out[high, enter[level]] += drop * self.drop_to[level]
        for level in range(1, top):
            for to in range(top + 1):
                out[phases + level - 1, enter[to]] += self.scarce[level, to]
        return out


def _stay(out: Floats, state: int, chance: float, phase: int) -> None:
    """Share `chance` between this phase and the next, so that a phase takes its length on
    average."""
    if phase + 1 == len(PHASE_STARTS):
        out[state, state] += chance
        return
    onwards = 1 / (PHASE_STARTS[phase + 1] - PHASE_STARTS[phase])
    out[state, state] += chance * (1 - onwards)
    out[state, state + 1] += chance * onwards


def levels_for(need: int, most: int) -> tuple[int, ...]:
    """Up to four even levels, the last the most that one pool would be asked for: the need, or what
    pools have at most if that is less."""
    top = max(1, min(need, most))
    return tuple(sorted({-(-top * part // 4) for part in range(1, 5)}))


def fit(
    capacity: Ints,
    pools: tuple[str, ...],
    regions: tuple[str, ...],
    levels: tuple[int, ...],
    period_s: float,
) -> Chain:
    """Learn from capacity (steps x pools: machines to be had). ValueError for less than two
    steps."""
    if len(capacity) < 2 or capacity.shape[1] != len(pools):
        raise ValueError(
            f"capacity is {capacity.shape}; a history has at least 2 steps and {len(pools)} pools"
        )
    at = np.searchsorted(np.array(levels), capacity, side="right")
    top = len(levels)
    moves = np.zeros((top + 1, top + 1))
    np.add.at(moves, (at[:-1].ravel(), at[1:].ravel()), 1)
    low, high = _spells(at == 0), _spells(at == top)
    drop, rise = _falling_rates(high, at, top), _falling_rates(low, at, 0)
    expected = np.array(
        [drop[high[:-1, p][at[:-1, p] == top]].sum() for p in range(at.shape[1])], dtype=float
    )
    seen = ((at[:-1] == top) & (at[1:] < top)).sum(0).astype(float)
    return Chain(
        pools=pools,
        regions=regions,
        levels=levels,
        period_s=period_s,
        drop=drop,
        rise=rise,
        drop_to=_shares(moves[top], range(top)),
        rise_to=_shares(moves[0], range(1, top + 1)),
        scarce=np.array([_shares(moves[level], range(top + 1)) for level in range(top + 1)]),
        drops=seen,
        expected=expected,
        together=_together(at, regions),
    )


def _spells(inside: NDArray[np.bool_]) -> Ints:
    """Of each step and pool: the phase of the spell it lies in (0 outside, to be masked)."""
    age = np.zeros(inside.shape[1], dtype=np.int64)
    phases = np.zeros(inside.shape, dtype=np.int64)
    starts = np.array(PHASE_STARTS)
    for step in range(len(inside)):
        phases[step] = np.searchsorted(starts, age, side="right") - 1
        age = np.where(inside[step], age + 1, 0)
    return phases


def _falling_rates(phases: Ints, at: Ints, level: int) -> Floats:
    """Chance to leave `level` by phase, made non-increasing (pool adjacent violators)."""
    inside = at[:-1] == level
    gone = inside & (at[1:] != level)
    blocks: list[list[float]] = []
    for phase in range(len(PHASE_STARTS)):
        here = phases[:-1] == phase
        events = float((gone & here).sum()) + SMOOTHING
        blocks.append([events, float((inside & here).sum()) + 2 * 50 * SMOOTHING, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] < blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return np.array([events / steps for events, steps, many in blocks for _ in range(int(many))])


def _shares(counts: Floats, to: range) -> Floats:
    """Chances of the levels `to`, smoothed; 0 for all others."""
    out = np.zeros(len(counts))
    chosen = counts[to.start : to.stop] + SMOOTHING / len(to)
    out[to.start : to.stop] = chosen / chosen.sum()
    return out


def _together(at: Ints, regions: tuple[str, ...]) -> float:
    """Of a pool's drops, the share in which another pool of its region that could drop did."""
    drops = at[1:] < at[:-1]
    could = at[:-1] > 0
    both = pairs = 0
    for one, here in enumerate(regions):
        for other, there in enumerate(regions):
            if one != other and here == there:
                both += int((drops[:, one] & drops[:, other]).sum())
                pairs += int((drops[:, one] & could[:, other]).sum())
    return both / pairs if pairs else 0.0
