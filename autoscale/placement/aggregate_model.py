"""The program behind the aggregate planners, as arrays: which counts of machines carry which loads.

Groups are units that serve alike (as many replicas of one shape); where they can be bought at
several prices, the cheap ones are taken first, so that equal machines are never told apart. A
bucket's requests are cut into `slices` equal parts, as Melange does (Griggs et al., 2024, section
5), or shared out freely. A part goes to one mixed group, or to one prefill and one decode group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
GroupRole = Literal["mixed", "prefill", "decode"]
TOLERANCE = 1e-6  # of a machine: what a solver of floating point can hold
STEP_USD = 1e-7
UNLIMITED = 10**6  # units of an offer without a quota


@dataclass(frozen=True, order=True)
class Tier:
    """Up to `most` units at one price. column: where the buyer finds it again."""

    usd_per_h: float
    most: int
    column: int


@dataclass(frozen=True)
class Group:
    """Units that serve alike. loads: by bucket, the units that it takes to serve all of the bucket;
    inf where it cannot. tiers: cheapest first."""

    role: GroupRole
    loads: Floats
    tiers: tuple[Tier, ...]

    @cached_property
    def most(self) -> int:
        """Never more than carry everything that this group can serve."""
        carried = float(self.loads[np.isfinite(self.loads)].sum())
        return min(sum(tier.most for tier in self.tiers), int(np.ceil(carried - TOLERANCE)))

    @property
    def unlimited(self) -> bool:
        return self.tiers[-1].most >= UNLIMITED

    @cached_property
    def costs(self) -> Floats:
        """$/h of 0, 1, ... `most` units."""
        each: list[float] = []
        for tier in self.tiers:
            each += [tier.usd_per_h] * min(tier.most, self.most - len(each))
        return np.concatenate([[0.0], np.cumsum(each)])


Option = tuple[int, ...]  # groups that a part needs: one mixed, or one prefill and one decode


@dataclass(frozen=True)
class Pool:
    """Columns that draw on one quota: what a unit of each takes, and how much there is."""

    columns: tuple[int, ...]
    weights: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Instance:
    """groups, buckets and slices as above; slices None: any share. pools: quotas that several
    groups draw on (those of one group are in its tiers)."""

    groups: tuple[Group, ...]
    buckets: int
    slices: int | None
    pools: tuple[Pool, ...] = ()

    @cached_property
    def loads(self) -> Floats:
        """[group, bucket]."""
        if not self.groups:
            return np.zeros((0, self.buckets))
        return np.stack([group.loads for group in self.groups])

    @cached_property
    def finite_loads(self) -> Floats:
        """[group, bucket], 0 where a group cannot serve."""
        return np.where(np.isfinite(self.loads), self.loads, 0.0)

    @cached_property
    def apart(self) -> bool:
        """Whether prompts and tokens can be served by different groups."""
        return bool(self.by_role("prefill") and self.by_role("decode"))

    def not_of(self, role: str) -> Floats:
        """[group, 1]: inf for groups of other roles, else 0; to be added to a value."""
        return self._not_of[role]

    @cached_property
    def _not_of(self) -> dict[str, Floats]:
        return {
            role: np.array([[0.0 if group.role == role else np.inf] for group in self.groups])
            for role in ("mixed", "prefill", "decode")
        }

    @cached_property
    def most(self) -> Integers:
        return np.array([group.most for group in self.groups], dtype=np.int64)

    @cached_property
    def cheapest(self) -> Floats:
        """$/h of the first unit of each group."""
        return np.array([group.tiers[0].usd_per_h for group in self.groups])

    def by_role(self, role: GroupRole) -> list[int]:
        return [at for at, group in enumerate(self.groups) if group.role == role]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        alone: list[Option] = [(at,) for at in self.by_role("mixed")]
        pairs = [
            (first, then) for first in self.by_role("prefill") for then in self.by_role("decode")
        ]
        return (*alone, *pairs)

    def cost(self, units: Integers) -> float:
        return float(sum(g.costs[n] for g, n in zip(self.groups, units, strict=True)))

    def buy(self, units: Integers) -> dict[int, int] | None:
        """Units of each column for these counts of groups, cheap tiers first; best where there are
        no pools. None where it finds no way within the pools."""
        left = {pool: pool.most for pool in self.pools}
        drawn = {c: (p, w) for p in self.pools for c, w in zip(p.columns, p.weights, strict=True)}
        bought: dict[int, int] = {}
        for group, needed in zip(self.groups, units.tolist(), strict=True):
            for tier in group.tiers:
                taken = min(needed, tier.most)
                if tier.column in drawn:
                    pool, weight = drawn[tier.column]
                    taken = min(taken, left[pool] // weight)
                    left[pool] -= taken * weight
                if taken:
                    bought[tier.column] = taken
                needed -= taken
            if needed:
                return None
        return bought

    def price_of(self, bought: Mapping[int, int]) -> float:
        """$/h of so many units of each column."""
        prices = {tier.column: tier.usd_per_h for group in self.groups for tier in group.tiers}
        return sum(prices[column] * units for column, units in bought.items())


@dataclass(frozen=True)
class Assignment:
    """Of each bucket, the share that each option serves, by the option's place in
    `Instance.options`."""

    shares: tuple[dict[int, float], ...]

    def usage(self, instance: Instance) -> Floats:
        """Units that each group needs."""
        used = np.zeros(len(instance.groups))
        for bucket, shares in enumerate(self.shares):
            for option, share in shares.items():
                for group in instance.options[option]:
                    used[group] += share * instance.loads[group, bucket]
        return used


@dataclass(frozen=True)
class Solution:
    """units of each group and of each column, who serves what, and what no plan can go below."""

    units: Integers
    bought: dict[int, int]
    assignment: Assignment
    usd_per_h: float
    bound_usd_per_h: float
    solver: str
