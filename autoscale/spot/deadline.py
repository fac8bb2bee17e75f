"""Training jobs that must end by a deadline, on a spot pool that comes and goes, with on-demand
machines as the way out.

Baseline: uniform progress (Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under
Deadlines", NSDI 24, section 4.3) with its rules: stay on spot until it is taken, fall back on
demand when behind the straight line to the deadline, leave it when ahead by two changeovers, and a
safety net at the end. Ours: a dynamic programme over time left, work left, the pool's state and the
machine in use, with the chances of `levels.Chain`; the deadline is a hard constraint, so it holds
whatever the market does.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoscale.spot.levels import PHASE_STARTS, PRIOR_EVENTS, Chain, Floats

Mode = Literal["idle", "spot", "on_demand"]
MODES: tuple[Mode, ...] = ("idle", "spot", "on_demand")


@dataclass(frozen=True)
class Job:
    """work_steps of computing within deadline_steps. A changeover takes one step: it is paid and
    does no work. Prices are per step. ValueError when even on-demand machines would be late."""

    work_steps: int
    deadline_steps: int
    spot_usd: float
    on_demand_usd: float

    def __post_init__(self) -> None:
        if self.deadline_steps < self.work_steps + 1:
            raise ValueError(
                f"deadline_steps is {self.deadline_steps}; {self.work_steps} steps of work and a "
                f"start need at least {self.work_steps + 1}"
            )


@dataclass(frozen=True)
class Now:
    """Where a job stands: steps gone, work left, what it runs on, whether spot is to be had, and
    for how many steps that has been so."""

    step: int
    work_left: int
    mode: Mode
    available: bool
    age_steps: int


class UniformProgress:
    """The baseline."""

    name = "uniform progress"

    def __init__(self, job: Job) -> None:
        self.job = job

    def decide(self, now: Now) -> Mode:
        job = self.job
        left = job.deadline_steps - now.step
        if left <= now.work_left + 2:  # safety net: two changeovers and no further risk
            return "spot" if now.mode == "spot" and left > now.work_left + 1 else "on_demand"
        done = job.work_steps - now.work_left
        if now.mode == "on_demand":
            ahead = done >= _line(job, now.step + 2)
            if not ahead:
                return "on_demand"
            return "spot" if now.available else "idle"
        if now.available:
            return "spot"
        return "on_demand" if done < _line(job, now.step) else "idle"


def _line(job: Job, step: int) -> float:
    """The work that is done by `step` when progress is uniform."""
    return step * job.work_steps / job.deadline_steps


class LeastCost:
    """The programme, solved once for a job and a chain of one level."""

    name = "least cost"

    def __init__(self, job: Job, chain: Chain, pool: str) -> None:
        if chain.top != 1:
            raise ValueError(f"chain: has {chain.top} levels; a job on one machine needs exactly 1")
        self.job = job
        place = chain.pools.index(pool)
        factor = (chain.drops[place] + PRIOR_EVENTS) / (chain.expected[place] + PRIOR_EVENTS)
        self._matrix = chain.matrix(float(factor))
        self._states = chain.state_levels
        self._starts = np.array(PHASE_STARTS)
        self._best, self._start = self._solve()

    def decide(self, now: Now) -> Mode:
        phase = int(np.searchsorted(self._starts, now.age_steps, side="right")) - 1
        state = phase + (len(self._starts) if now.available else 0)
        row = self._best[now.step, now.work_left, state]
        return MODES[int(row[MODES.index(now.mode)])]

    def expected_usd(self, available: bool) -> float:
        """Of a job that begins as the pool has just come (or gone)."""
        return float(self._start[self.job.work_steps, len(self._starts) * available, 0])

    def _solve(self) -> tuple[NDArray[np.int8], Floats]:
        """best[step, work left, state, mode]: the place in MODES of the least expected cost; and
        the cost at step 0."""
        job, states = self.job, len(self._states)
        cost = np.full((job.work_steps + 1, states, 3), np.inf)
        cost[0] = 0
        best = np.zeros((job.deadline_steps, job.work_steps + 1, states, 3), dtype=np.int8)
        up = self._states > 0
        for step in range(job.deadline_steps - 1, -1, -1):
            after = self._after(cost)  # expected cost to come, by work left, state now, mode now
            options = np.full((3, *cost.shape), np.inf)  # what to run on, then as cost
            options[0] = after[:, :, 0, None]
            for place, price in ((1, job.spot_usd), (2, job.on_demand_usd)):
                stay = price + np.concatenate([np.zeros((1, states)), after[:-1, :, place]])
                change = price + after[:, :, place]
                for mode in range(3):
                    options[place, :, :, mode] = stay if mode == place else change
            options[1][:, ~up] = np.inf
            options[:, 0] = np.inf
            options[0, 0] = 0
            best[step] = np.argmin(options, axis=0)
            cost = np.min(options, axis=0)
        return best, cost

    def _after(self, cost: Floats) -> Floats:
        """Over the next state of the pool: running on spot goes on only where it is still there."""
        nexts = cost.copy()
        gone = self._states == 0
        nexts[:, gone, 1] = cost[:, gone, 0]
        flat = np.nan_to_num(nexts, posinf=1e18)
        out = np.einsum("st,wtm->wsm", self._matrix, flat)
        return np.where(out > 1e15, np.inf, out)
