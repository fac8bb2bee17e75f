"""What is believed of each pool now, from nothing but one's own launches and losses.

A hidden Markov filter over the states of `levels.Chain`: time moves the belief along the chain, an
observation cuts away what it excludes. So a pool that has not been asked for long tends to its
long-run mix, one that refused is known to be empty and comes back as fast as such pools did, and
one that holds on becomes trusted. A pool's factor goes on being learnt from its own losses, with a
half-life; chance and time are the caller's.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscale.spot.events import SpotEvent
from autoscale.spot.levels import PRIOR_EVENTS, Chain, Floats

HALF_LIFE_S = 9 * 86_400.0
REFIT = 0.05  # a pool's matrix follows its factor in steps of this size
FLOOR = 1e-12


class SpotRisk:
    """Beliefs over the pools of a chain. A memory: changes in `observe` alone."""

    def __init__(self, chain: Chain, start_s: float = 0.0) -> None:
        self.chain = chain
        self._others: dict[str, int] = {}
        self._place = {pool: place for place, pool in enumerate(chain.pools)}
        self._levels = chain.state_levels
        self._steps = [round(start_s / chain.period_s)] * len(chain.pools)
        self._held = [0] * len(chain.pools)
        self._drops = chain.drops.copy()
        self._expected = chain.expected.copy()
        self._factors = (self._drops + PRIOR_EVENTS) / (self._expected + PRIOR_EVENTS)
        self._matrices = np.stack([chain.matrix(float(factor)) for factor in self._factors])
        self.beliefs = np.stack([_settled(matrix) for matrix in self._matrices])

    @property
    def factors(self) -> Floats:
        """How often each pool drops, beside what its phases would say."""
        return self._factors.copy()

    def observe(self, event: SpotEvent) -> None:
        """KeyError for a pool that the chain does not know."""
        place = self._place[event.pool]
        if event.kind in ("notice", "price"):
            return
        self._advance(place, round(event.t_s / self.chain.period_s))
        count = int(event.value)
        level = sum(count >= threshold for threshold in self.chain.levels)
        if event.kind == "preempt":
            self._drops[place] += 1
        seen = self._levels >= level
        if event.kind in ("preempt", "launch_fail"):
            seen = self._levels == level
        self._condition(place, seen)
        self._held[place] = count

    def chance(self, pool: str, count: int) -> float:
        """That the pool would hold `count` machines now."""
        count += self._others.get(pool, 0)
        level = sum(count >= threshold for threshold in self.chain.levels)
        return float(self.beliefs[self._place[pool]][self._levels >= level].sum())

    def beside(self, others: Mapping[str, int]) -> "SpotRisk":
        """The same beliefs for somebody who shares the pools with holders of so many machines:
        `chance` then counts from there."""
        shared = copy.copy(self)
        shared._others = dict(others)
        return shared

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpotRisk":
        """One that observes on its own. The chain and what only it decides never change."""
        other = copy.copy(self)
        for name in ("_steps", "_held", "_drops", "_expected", "_factors", "_matrices", "beliefs"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other

    def survivors(self, horizon_s: float) -> Floats:
        """pools x levels asked x levels kept: chance that of a holding of level k (0..top), level j
        is what is left when horizon_s has passed, the pool having so many now."""
        steps = max(1, -(-round(horizon_s) // round(self.chain.period_s)))
        top = self.chain.top
        at_least = np.arange(1, top + 1)[:, None] <= self._levels  # level x state
        able = self.beliefs[:, None, :] * at_least + FLOOR * (self._levels == top)
        able /= able.sum(2, keepdims=True)
        mass = able[:, :, None, :]  # pool x asked x kept x state: what has never been below kept
        for _ in range(steps):
            mass = np.matmul(mass, self._matrices[:, None]) * at_least
        reached = np.zeros((len(able), top + 1, top + 2))
        reached[:, :, 0] = 1
        reached[:, 1:, 1:-1] = mass.sum(3)
        reached *= np.arange(top + 2) <= np.arange(top + 1)[:, None]  # keeps no more than was asked
        return np.asarray(reached[:, :, :-1] - reached[:, :, 1:])

    def _advance(self, place: int, step: int) -> None:
        ahead = step - self._steps[place]
        assert ahead >= 0, "events come in the order of their times"
        if not ahead:
            return
        belief = self.beliefs[place]
        held = self._held[place]
        if held:
            hidden = self.chain.drop_to[sum(held >= t for t in self.chain.levels) :].sum()
            plenty = belief[-len(self.chain.drop) :]
            self._expected[place] += ahead * float(plenty @ self.chain.drop) * (1 - hidden)
        belief = belief @ np.linalg.matrix_power(self._matrices[place], ahead)
        self.beliefs[place] = belief
        self._steps[place] = step
        keep = 0.5 ** (ahead * self.chain.period_s / HALF_LIFE_S)
        self._drops[place] *= keep
        self._expected[place] *= keep
        self._follow(place)

    def _follow(self, place: int) -> None:
        factor = (self._drops[place] + PRIOR_EVENTS) / (self._expected[place] + PRIOR_EVENTS)
        if abs(factor / self._factors[place] - 1) > REFIT:
            self._factors[place] = factor
            self._matrices[place] = self.chain.matrix(float(factor))

    def _condition(self, place: int, possible: NDArray[np.bool_]) -> None:
        """Keep what the observation allows. What was thought impossible and happened all the same
        starts again from the allowed states, evenly."""
        belief = self.beliefs[place] * possible
        total = float(belief.sum())
        if total < FLOOR:
            belief, total = possible.astype(float), float(possible.sum())
        self.beliefs[place] = belief / total


def _settled(matrix: Floats) -> Floats:
    """The chain's long-run mix."""
    return np.asarray(np.linalg.matrix_power(matrix, 1 << 14)[0])
