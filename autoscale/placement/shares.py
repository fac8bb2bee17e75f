"""Shares of a training batch on unlike accelerators, and what to buy for a rate of training (the
hardware-aware balance of Whale, ATC 22, in whole samples)."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from autoscale.placement.plan import Plan, Purchase
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.pools import Unit, units

GLOBAL_BATCH = 256
MOST_UNITS = 10_000


@dataclass(frozen=True)
class Worker:
    """A replica in training: seconds of a step whatever its share, seconds of each sample, and most
    samples that its memory takes."""

    sample_s: float
    most_samples: int
    fixed_s: float = 0.0

    def step_s(self, samples: int) -> float:
        return self.fixed_s + samples * self.sample_s if samples else 0.0


def batch_shares(workers: Sequence[Worker], samples: int) -> list[int]:
    """Whole samples of each worker, so that the slowest of a step is done first. InfeasibleError
    where memory takes fewer.

    One sample after the other to the worker that would then end first: for times that rise with
    the share this is the least that the slowest can be.
    """
    room = sum(worker.most_samples for worker in workers)
    if room < samples:
        raise InfeasibleError(f"memory: {room} samples fit on all workers, the batch has {samples}")
    shares = [0] * len(workers)
    heap = [(w.step_s(1), n) for n, w in enumerate(workers) if w.most_samples > 0]
    heapq.heapify(heap)
    for _ in range(samples):
        _, n = heapq.heappop(heap)
        shares[n] += 1
        if shares[n] < workers[n].most_samples:
            heapq.heappush(heap, (workers[n].step_s(shares[n] + 1), n))
    return shares


def step_s(workers: Sequence[Worker], shares: Sequence[int]) -> float:
    """Seconds of a step that ends when the last worker does."""
    return max(worker.step_s(share) for worker, share in zip(workers, shares, strict=True))


class SharesPlanner:
    """The cheapest machines that train at the demand's rate, and the share of each.

    The demand is one bucket: so many samples per second of input_tokens each. Shapes have the role
    "training"; the profile's requests_per_s are samples per second. Every step takes a batch of
    global_batch whole samples, so a worker counts with the samples that it finishes in a step's
    time."""

    name = "shares"

    def __init__(self, global_batch: int = GLOBAL_BATCH) -> None:
        self._batch = global_batch

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        """InfeasibleError with what binds; ValueError for several buckets."""
        began = time.monotonic()
        if len(problem.demand.requests_per_s) != 1:
            raise ValueError(
                f"demand: training takes one bucket, not {len(problem.demand.requests_per_s)}"
            )
        ((bucket, samples_per_s),) = problem.demand.requests_per_s.items()
        offered = [unit for unit in units(problem) if unit.shape.role == "training"]
        if not offered:
            raise InfeasibleError("memory: no shape of the role training on offer trains the model")
        step = self._batch / samples_per_s
        able = [_samples(unit, unit.per_s[bucket] / unit.replicas, step) for unit in offered]
        counts, bound = self._counts(offered, able, deadline_s)
        workers, owner = [], list[int]()
        for n, unit in enumerate(offered):
            replicas = counts[n] * unit.replicas
            sample_s = unit.replicas / unit.per_s[bucket]
            workers += [Worker(sample_s, self._batch)] * replicas
            owner += [n] * replicas
        shares = batch_shares(workers, self._batch)
        bought = [n for n, count in enumerate(counts) if count]
        routing = {
            place: sum(share for share, n in zip(shares, owner, strict=True) if n == bought_n)
            / self._batch
            for place, bought_n in enumerate(bought)
        }
        return Plan(
            tuple(_purchase(offered[n], counts[n]) for n in bought),
            sum(counts[n] * offered[n].usd_per_h for n in bought),
            bound,
            f"shares: integer program, steps of {step_s(workers, shares):.3g} s",
            routing={bucket: routing},
            limits=_limits(offered, counts),
            sources=(problem.profile.source,),
            solved_s=time.monotonic() - began,
        )

    def _counts(
        self, offered: Sequence[Unit], able: Sequence[int], deadline_s: float
    ) -> tuple[list[int], float]:
        """How many of each unit, and the bound on the cost."""
        rows = [np.array([n * u.replicas for n, u in zip(able, offered, strict=True)], float)]
        low, high = [float(self._batch)], [np.inf]
        for offer in {unit.offer.name: unit.offer for unit in offered}.values():
            if offer.quota is not None:
                rows.append(
                    np.array([u.machines * (u.offer.name == offer.name) for u in offered], float)
                )
                low.append(0.0)
                high.append(float(offer.quota))
        solved = milp(
            np.array([unit.usd_per_h for unit in offered]),
            constraints=LinearConstraint(np.array(rows), np.array(low), np.array(high)),
            integrality=np.ones(len(offered), dtype=np.int64),
            bounds=Bounds(0, MOST_UNITS),
            options={"time_limit": deadline_s, "mip_rel_gap": 1e-9},
        )
        if solved.x is None:
            raise InfeasibleError("quota: all that may be bought trains more slowly than demanded")
        counts = [round(count) for count in np.asarray(solved.x, dtype=np.float64).tolist()]
        cost = sum(n * unit.usd_per_h for n, unit in zip(counts, offered, strict=True))
        dual = solved.mip_dual_bound
        return counts, cost if dual is None else min(cost, float(dual))


def _samples(unit: Unit, samples_per_s: float, step: float) -> int:
    """Whole samples that one replica finishes within a step."""
    return int(samples_per_s * step * (1 + 1e-12)) if unit.replicas else 0


def _purchase(unit: Unit, count: int) -> Purchase:
    return Purchase(
        unit.offer.name,
        count * unit.machines,
        unit.shape,
        count * unit.replicas,
        count * unit.usd_per_h,
    )


def _limits(offered: Sequence[Unit], counts: Sequence[int]) -> tuple[str, ...]:
    used: dict[str, int] = {}
    for count, unit in zip(counts, offered, strict=True):
        used[unit.offer.name] = used.get(unit.offer.name, 0) + count * unit.machines
    return ("quota",) if any(u.offer.quota == used[u.offer.name] for u in offered) else ()
