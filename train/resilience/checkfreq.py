"""How often to write a checkpoint, from a budget of slowdown instead of an interval.

CheckFreq (Mohan, Phanishayee and Chidambaram, FAST 2021): a checkpoint every
k = ceil(max(T_persist / T_iter, overhead / (p T_iter))) iterations, so that one is durable before
the next begins and all of them together cost at most the share p. Everything in it is measured
while training, and measured again all the time. Pure: it is told durations and reads no clock.
"""

from collections import deque
from math import ceil
from statistics import mean, median

WARM_UP = 2
"""Iterations left out of the beginning: they allocate and compile."""
KEPT_ITERATIONS = 64
KEPT_CHECKPOINTS = 5
QUIET_AT_LEAST = 3
"""Iterations without a checkpoint under way that an interval has, so that T_iter stays known."""
FIRST_INTERVAL = 6
AIM = 0.8
"""Of the budget: measurements scatter, and the budget is to be kept, not met on average."""


def interval(iteration_s: float, persist_s: float, overhead_s: float, budget: float) -> int:
    """Iterations from one checkpoint to the next, at least 1. iteration_s: one without any
    checkpoint; persist_s: from its beginning until it is durable; overhead_s: what it makes
    training longer by; budget: the share of slowdown that is allowed (0.035 is 3.5 %)."""
    assert iteration_s > 0 and budget > 0
    return max(1, ceil(max(persist_s / iteration_s, overhead_s / (budget * iteration_s))))


class CheckFreq:
    """The policy's memory, on one rank. budget: as above."""

    def __init__(self, budget: float = 0.035) -> None:
        if not 0 < budget <= 1:
            raise ValueError(f"budget = {budget}: a share of slowdown above 0 and up to 1")
        self.budget = budget
        self._warm = 0
        self._quiet: deque[float] = deque(maxlen=KEPT_ITERATIONS)
        self._busy: list[float] = []
        self._overheads: deque[float] = deque(maxlen=KEPT_CHECKPOINTS)
        self._persists: deque[float] = deque(maxlen=KEPT_CHECKPOINTS)

    def iteration(self, duration_s: float, busy: bool) -> None:
        """An iteration has ended. busy: a checkpoint was being copied or written in it."""
        if self._warm < WARM_UP and not busy:
            self._warm += 1
        elif busy:
            self._busy.append(duration_s)
        else:
            self._quiet.append(duration_s)

    def persisted(self, persist_s: float) -> None:
        """A checkpoint is durable, persist_s after it was begun; its iterations have been told."""
        if self._quiet:
            usual_s = self.iteration_s
            self._overheads.append(max(0.0, sum(self._busy) - usual_s * len(self._busy)))
            self._persists.append(persist_s)
        self._busy.clear()

    @property
    def iteration_s(self) -> float:
        """The median iteration without a checkpoint under way."""
        return median(self._quiet)

    @property
    def overhead_s(self) -> float:
        """What a checkpoint costs: the mean of the last ones, for it is their sum that counts."""
        return mean(self._overheads)

    @property
    def known(self) -> bool:
        """Whether a checkpoint has been measured."""
        return bool(self._overheads)

    def interval(self) -> int:
        """The interval by all that is known now. One has to be `known`."""
        persist_s = mean(self._persists)
        chosen = interval(self.iteration_s, persist_s, self.overhead_s, AIM * self.budget)
        return max(chosen, ceil(persist_s / self.iteration_s) + QUIET_AT_LEAST)
