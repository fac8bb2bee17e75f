"""Samples by measured speed (Whale, Jia et al. 2022): who is faster gets more, so that all end at
once. The gradient is that of the whole batch whatever the shares, since it is a sum over samples.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from train.data.stream import Share, share
from train.world import World


class Shares(Protocol):
    """How a step's samples are shared out. Every worker asks alike, and gets its own."""

    def mine(self, first: int, count: int, world: World) -> Share:
        """What this worker takes of samples first to first + count - 1. Collective."""
        ...

    def computed(self, samples: int, seconds: float) -> None:
        """What this worker has done of the step, and how long it took, waiting left out."""
        ...


class Equal:
    """To all alike, up to one sample."""

    def mine(self, first: int, count: int, world: World) -> Share:
        """See `Shares`."""
        return share(first, count, world.rank, world.size)

    def computed(self, samples: int, seconds: float) -> None:
        """Makes no difference."""


class Measured:
    """By samples a second, measured and told to all every few steps.

    unit: samples that are computed at once; shares are whole units where that can be. memory: the
    most samples a worker takes in a step, where it has less memory than others; 0: no limit.
    every: steps between two measurements that are acted on; keep: what an old one counts.
    """

    def __init__(self, unit: int = 1, memory: int = 0, every: int = 4, keep: float = 0.5) -> None:
        self._unit, self._memory, self._every, self._keep = unit, memory, every, keep
        self._per_s, self._generation, self._step = 0.0, -1, 0
        self._rates: list[float] = []
        self._caps: list[int] = []

    def mine(self, first: int, count: int, world: World) -> Share:
        """See `Shares`. Equal shares until all have been measured."""
        if world.generation != self._generation:
            self._generation, self._step, self._rates = world.generation, 0, []
        if self._step and self._step % self._every == 0:
            self._tell(world)
        self._step += 1
        if not self._rates or min(self._rates) <= 0:
            return share(first, count, world.rank, world.size)
        counts = shares(count, self._rates, self._unit, self._caps)
        return Share(first + sum(counts[: world.rank]), counts[world.rank])

    def computed(self, samples: int, seconds: float) -> None:
        """See `Shares`."""
        if samples and seconds > 0:
            rate = samples / seconds
            self._per_s = (
                self._keep * self._per_s + (1 - self._keep) * rate if self._per_s else rate
            )

    def _tell(self, world: World) -> None:
        told = world.all_gather(torch.tensor([self._per_s, self._memory], dtype=torch.float64))
        self._rates = [float(row[0]) for row in told]
        self._caps = [int(row[1]) for row in told]


def shares(
    count: int, rates: Sequence[float], unit: int = 1, caps: Sequence[int] = ()
) -> list[int]:
    """count samples in proportion to rates, such that the last one to end ends as early as whole
    units allow; one that is full (caps, 0: never) leaves the rest to others. The last unit may be
    smaller. ValueError when all together cannot hold them."""
    limits = [cap or count for cap in caps] or [count] * len(rates)
    if sum(limits) < count:
        raise ValueError(
            f"{count} samples of a step do not fit the workers' memory: {sum(limits)} would; "
            "make run.batch_tokens smaller or add workers"
        )
    held = [0] * len(rates)
    left = count
    while left:
        size = min(unit, left)
        free = [rank for rank, cap in enumerate(limits) if held[rank] + size <= cap]
        if not free:
            size, free = 1, [rank for rank, cap in enumerate(limits) if held[rank] < cap]
        soonest = min(free, key=lambda rank: ((held[rank] + size) / rates[rank], rank))
        held[soonest] += size
        left -= size
    return held
