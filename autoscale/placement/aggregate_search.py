"""Cheapest counts first: counts of machines are listed by cost between a lower bound and a plan in
hand, thrown out in bulk by proofs (`aggregate_bounds`), and the first that carries the demand is
best.

Most instances end here without a tree. Where too many counts lie between bound and plan, or too
many of them are undecided, HiGHS takes over with the bound and the plan (`aggregate_milp`).
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from autoscale.placement import aggregate_milp as milp
from autoscale.placement.aggregate_bounds import (
    Proofs,
    ascend,
    price_bound,
    refuted_by_slices,
)
from autoscale.placement.aggregate_model import (
    STEP_USD,
    TOLERANCE,
    Assignment,
    Floats,
    Instance,
    Integers,
    Solution,
)

MOST_COUNTS = 60_000
MOST_UNDECIDED = 24
MOST_OPTIONS = 8
TRIES, NEAR = 8, 0.08


def search(
    instance: Instance, *, deadline_s: float, most_counts: int = MOST_COUNTS
) -> Solution | None:
    """The cheapest plan, or the best that the deadline allows with its bound; None when it is
    proved that there is none. most_counts 0: HiGHS from the start."""
    ends_s = time.monotonic() + deadline_s
    bound = price_bound(instance) if instance.options else np.inf
    if not np.isfinite(bound):
        return None
    held = first_plan(instance)
    highest = np.inf if held is None else held.usd_per_h - STEP_USD
    counts = None
    if not instance.pools:
        counts = counts_below(instance, bound, highest, most_counts)
    if counts is None:
        return _by_milp(instance, held, bound, ends_s)
    found, reached = _first_feasible(instance, counts, ends_s)
    if found is not None:
        return found
    if reached is None:
        return None if held is None else _proved(held, "cost order")
    return _by_milp(instance, held, max(bound, reached), ends_s)


def counts_below(
    instance: Instance, low: float, high: float, most: int = MOST_COUNTS
) -> Integers | None:
    """All counts [n, group] that cost between low and high and keep the quotas, cheapest first;
    None if there are more than `most`."""
    if not np.isfinite(high):
        high = sum(float(group.costs[-1]) for group in instance.groups) + STEP_USD
    order = np.argsort([-group.costs[min(1, group.most)] for group in instance.groups])
    counts, costs = np.zeros((1, len(order)), dtype=np.int64), np.zeros(1)
    for place, at in enumerate(order):
        table = instance.groups[at].costs
        total = costs[:, None] + table
        fits = total <= high
        if place == len(order) - 1:
            fits &= total >= low - STEP_USD
        if fits.sum() > most:
            return None
        rows, units = np.nonzero(fits)
        counts = counts[rows]
        counts[:, at] = units
        costs = total[rows, units]
    return counts[np.argsort(costs, kind="stable")]


def first_plan(instance: Instance) -> Solution | None:
    """Every bucket where it is cheapest, counts rounded up; the same over machines without a quota
    alone; any one option for all. The best of them, None where quotas allow none."""
    value = _values(instance, instance.cheapest)
    dearest = np.array([group.tiers[-1].usd_per_h for group in instance.groups])
    free = np.array([group.unlimited for group in instance.groups])
    unbound = _values(instance, np.where(free, dearest, np.inf))
    tried = [value.argmin(axis=0)]
    if np.isfinite(unbound.min(axis=0)).all():
        tried.append(unbound.argmin(axis=0))
    whole = np.argsort(value.sum(axis=1))[:MOST_OPTIONS]
    tried += [
        np.full(instance.buckets, option) for option in whole if np.isfinite(value[option]).all()
    ]
    plans = [
        _rounded(instance, Assignment(tuple({int(at): 1.0} for at in options))) for options in tried
    ]
    return min((plan for plan in plans if plan), key=lambda plan: plan.usd_per_h, default=None)


def _rounded(instance: Instance, assignment: Assignment) -> Solution | None:
    """With as many machines as this assignment needs; None where quotas do not allow them."""
    units = np.ceil(assignment.usage(instance) - TOLERANCE).astype(np.int64)
    bought = instance.buy(units)
    if bought is None:
        return None
    return Solution(units, bought, assignment, instance.price_of(bought), 0.0, "rounding")


def _in_slices(assignment: Assignment, slices: int | None) -> Assignment:
    """Shares as whole slices: the largest remainders are rounded up."""
    if slices is None:
        return assignment
    every = []
    for shares in assignment.shares:
        floors = {at: int(share * slices + 1e-9) for at, share in shares.items()}
        over = sorted(shares, key=lambda at: floors[at] - shares[at] * slices)
        for at in over[: slices - sum(floors.values())]:
            floors[at] += 1
        every.append({at: n / slices for at, n in floors.items() if n})
    return Assignment(tuple(every))


def _values(instance: Instance, weights: Floats) -> Floats:
    """[option, bucket]: weighted load; inf where the option cannot serve it."""
    priced = weights[:, None] * instance.loads
    return np.stack([priced[list(option)].sum(axis=0) for option in instance.options])


def fill(instance: Instance, units: Integers, weights: Floats) -> Assignment | None:
    """Share the demand out over these counts: buckets with most to lose first, each where its
    weighted load is least and room is left. None when that fails, which proves nothing."""
    value = _values(instance, weights)
    ranked = np.argsort(value, axis=0)
    room = (units + TOLERANCE).tolist()
    shares: list[dict[int, float]] = [{} for _ in range(instance.buckets)]
    for bucket in _by_regret(value):
        left = 1.0
        for at in ranked[:, bucket].tolist():
            if not np.isfinite(value[at, bucket]):
                break
            option = instance.options[at]
            fits = min(room[g] / float(instance.loads[g, bucket]) for g in option)
            taken = min(left, _whole(fits, instance.slices))
            if taken > 0:
                shares[bucket][at] = taken
                left -= taken
                for group in option:
                    room[group] -= taken * float(instance.loads[group, bucket])
            if left < 1e-12:
                break
        if left >= 1e-12:
            return None
    return Assignment(tuple(shares))


def fill_somehow(instance: Instance, units: Integers, weights: Floats) -> Assignment | None:
    """`fill` with these weights and with some near them, the same ones every time."""
    near = np.random.default_rng(0).normal(0, NEAR, (TRIES, len(weights)))
    for shift in (np.zeros(len(weights)), *near):
        assignment = fill(instance, units, weights * np.exp(shift))
        if assignment is not None:
            return assignment
    return None


def _first_feasible(
    instance: Instance, counts: Integers, ends_s: float
) -> tuple[Solution | None, float | None]:
    """The first of the counts that carries the demand. Else what the remaining ones cost at least,
    where some were left undecided, and None where all are refuted."""
    proofs = Proofs(np.zeros((0, len(instance.groups))), np.zeros(0))
    undecided = 0
    for chunk in _chunks(counts):
        chunk = chunk[~proofs.refute(chunk)]
        if not len(chunk):
            continue
        new, weights = ascend(instance, chunk)
        proofs = proofs.and_those(new)
        alive = ~proofs.refute(chunk)
        alive[alive] = ~refuted_by_slices(instance, chunk[alive], weights[alive])
        for units, weight in zip(chunk[alive], weights[alive], strict=True):
            usd = instance.cost(units)
            assignment = fill_somehow(instance, units, weight)
            if assignment is None and undecided < MOST_UNDECIDED:
                undecided += 1
                answer = milp.solve(instance, deadline_s=ends_s - time.monotonic(), units=units)
                if answer.units is None and answer.proved:
                    continue
                assignment = answer.assignment
            if assignment is None:
                return None, usd
            bought = instance.buy(units)
            assert bought is not None
            return Solution(units, bought, assignment, usd, usd, "cost order"), usd
    return None, None


def _chunks(counts: Integers) -> Iterator[Integers]:
    """Few at first, since the cheapest often carry the demand."""
    start, size = 0, 8
    while start < len(counts):
        yield counts[start : start + size]
        start, size = start + size, min(2 * size, 256)


def _by_milp(
    instance: Instance, held: Solution | None, bound: float, ends_s: float
) -> Solution | None:
    """HiGHS, below the plan in hand and above the bound. Before that without whole numbers, which
    gives a bound that knows of quotas; its machines rounded up are often a plan, and the program
    over the groups that it uses is small."""
    loose = milp.solve(instance, deadline_s=ends_s - time.monotonic(), relaxed=True)
    bound = max(bound, loose.bound_usd_per_h)
    if loose.assignment is not None:
        shared = _in_slices(loose.assignment, instance.slices)
        small = _over_used(instance, loose.assignment, (ends_s - time.monotonic()) / 2)
        plans = [plan for plan in (held, _rounded(instance, shared), small) if plan]
        held = min(plans, key=lambda plan: plan.usd_per_h, default=None)
    if held is not None and held.usd_per_h <= bound + STEP_USD:
        return _proved(held, "HiGHS")
    below = np.inf if held is None else held.usd_per_h - STEP_USD
    left_s = ends_s - time.monotonic()
    answer = milp.solve(instance, deadline_s=left_s, at_least=bound - STEP_USD, below=below)
    bound = max(bound, answer.bound_usd_per_h)
    if answer.assignment is not None and answer.units is not None:
        usd = instance.price_of(answer.bought)
        low = usd if answer.proved else min(bound, usd)
        return Solution(answer.units, answer.bought, answer.assignment, usd, low, "HiGHS")
    if answer.proved:
        return None if held is None else _proved(held, "HiGHS")
    if held is None:
        raise TimeoutError(
            "deadline_s is over and neither a plan nor a proof that there is none was found; "
            "accepted is a longer deadline_s"
        )
    return replace(held, bound_usd_per_h=min(bound, held.usd_per_h), solver="HiGHS, deadline")


def _over_used(instance: Instance, loose: Assignment, deadline_s: float) -> Solution | None:
    """The best plan over the groups that a relaxed one uses, where those are far fewer."""
    used = np.nonzero(loose.usage(instance) > TOLERANCE)[0].tolist()
    if 2 * len(used) > len(instance.groups):
        return None
    small = replace(instance, groups=tuple(instance.groups[at] for at in used))
    answer = milp.solve(small, deadline_s=deadline_s)
    if answer.assignment is None or answer.units is None:
        return None
    place = {option: at for at, option in enumerate(instance.options)}
    back = [place[tuple(used[g] for g in option)] for option in small.options]
    shares = tuple({back[at]: s for at, s in each.items()} for each in answer.assignment.shares)
    units = np.zeros(len(instance.groups), dtype=np.int64)
    units[used] = answer.units
    usd = instance.price_of(answer.bought)
    return Solution(units, answer.bought, Assignment(shares), usd, 0.0, "HiGHS")


def _proved(held: Solution, solver: str) -> Solution:
    return replace(held, bound_usd_per_h=held.usd_per_h, solver=solver)


def _by_regret(value: Floats) -> list[int]:
    """Buckets in the order of what the second best option costs more than the best."""
    if len(value) == 1:
        return list(range(value.shape[1]))
    two = np.partition(value, 1, axis=0)[:2]
    lost = np.where(np.isfinite(two[1]), two[1] - two[0], np.inf)
    return [int(at) for at in np.argsort(-lost, kind="stable")]


def _whole(share: float, slices: int | None) -> float:
    return share if slices is None else np.floor(share * slices + 1e-9) / slices
