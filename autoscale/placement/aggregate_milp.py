"""The integer program in full, for HiGHS: how many slices of each bucket go to each group (whole
numbers, so that equal slices are never told apart), how many units of each price are bought.

Stronger than its plain form by: a bucket's slices need a machine to be there (the linking of
facility location, where a machine carries more than the bucket), covering rows rounded up to whole
machines, and a known cost to stay below.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from autoscale.placement.aggregate_bounds import weighted_demand
from autoscale.placement.aggregate_model import TOLERANCE, Assignment, Floats, Instance, Integers


@dataclass
class Rows:
    """Rows of a sparse system, as they are made."""

    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        for column, value in terms:
            self.row.append(len(self.low))
            self.column.append(column)
            self.value.append(value)
        self.low.append(low)
        self.high.append(high)

    def constraint(self, columns: int) -> LinearConstraint:
        shape = (len(self.low), columns)
        matrix = csr_matrix((self.value, (self.row, self.column)), shape=shape)
        return LinearConstraint(matrix, np.array(self.low), np.array(self.high))


@dataclass(frozen=True)
class Found:
    """What HiGHS says. units None: nothing found. bound: -inf where it knows none; proved: the
    answer is final, also where it is that nothing exists."""

    units: Integers | None
    bought: dict[int, int]
    assignment: Assignment | None
    bound_usd_per_h: float
    proved: bool


def solve(
    instance: Instance,
    *,
    deadline_s: float,
    at_least: float = 0.0,
    below: float = np.inf,
    units: Integers | None = None,
    relaxed: bool = False,
) -> Found:
    """The cheapest plan that costs `at_least` and no more than `below`; with `units` given, only
    whether those carry the demand; relaxed: with parts of slices and of machines, so that only its
    bound and assignment mean anything."""
    index = _Index(instance)
    rows = Rows()
    _buckets(instance, index, rows)
    _capacity(instance, index, rows)
    if units is None:
        _linking(instance, index, rows)
        _covering(instance, index, rows)
    costs = [(index.bought(g, t), tier.usd_per_h) for g, t, tier in index.tiers]
    if units is None:
        rows.add(costs, at_least, below)
    low, high = _bounds(instance, index, units)
    objective = np.zeros(index.columns)
    for column, usd in costs:
        objective[column] = usd
    whole = np.full(index.columns, 0 if relaxed else 1, dtype=np.int64)
    if instance.slices is None:
        whole[: index.parts] = 0
    answer = milp(
        objective,
        constraints=rows.constraint(index.columns),
        integrality=whole,
        bounds=Bounds(low, high),
        options={"time_limit": max(deadline_s, 0.01), "mip_rel_gap": 0.0},
    )
    bound = answer.get("mip_dual_bound")
    proved = answer.status in (0, 2)
    bound_usd = -np.inf if bound is None else float(bound)
    if relaxed and answer.status == 0:
        bound_usd = float(answer.fun)
    if answer.x is None:
        return Found(None, {}, None, bound_usd, proved)
    return Found(*index.read(answer.x, whole_slices=not relaxed), bound_usd, proved)


class _Index:
    """Where each unknown stands: slices of a bucket in a group, then units of each tier."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self.groups = len(instance.groups)
        self.parts = instance.buckets * self.groups
        self.tiers = [(g, t, r) for g, group in enumerate(instance.groups)
                      for t, r in enumerate(group.tiers)]  # fmt: skip
        self._first = {(g, t): self.parts + at for at, (g, t, _) in enumerate(self.tiers)}
        self.columns = self.parts + len(self.tiers)

    def part(self, bucket: int, group: int) -> int:
        return bucket * self.groups + group

    def bought(self, group: int, tier: int) -> int:
        return self._first[group, tier]

    def all_bought(self, group: int) -> list[int]:
        return [self.bought(g, t) for g, t, _ in self.tiers if g == group]

    def read(self, x: Floats, *, whole_slices: bool) -> tuple[Integers, dict[int, int], Assignment]:
        slices = self.instance.slices
        bought = {tier.column: round(x[self.bought(g, t)]) for g, t, tier in self.tiers}
        units = np.array(
            [sum(bought[tier.column] for tier in group.tiers) for group in self.instance.groups],
            dtype=np.int64,
        )
        parts = x[: self.parts].reshape(-1, self.groups)
        parts = np.rint(parts) if slices and whole_slices else np.maximum(parts, 0)
        parts = parts / (slices or 1)
        return units, {c: n for c, n in bought.items() if n}, paired(self.instance, parts)


def paired(instance: Instance, parts: Floats) -> Assignment:
    """Shares [bucket, group] as shares of options: prefill and decode parts are matched in turn."""
    place = {option: at for at, option in enumerate(instance.options)}
    every: list[dict[int, float]] = []
    for row in parts:
        shares = {place[(g,)]: float(row[g]) for g in instance.by_role("mixed") if row[g] > 1e-9}
        left = {g: float(row[g]) for g in instance.by_role("decode") if row[g] > 1e-9}
        for first in instance.by_role("prefill"):
            rest = float(row[first])
            for then in list(left):
                moved = min(rest, left[then])
                if moved > 1e-9:
                    at = place[(first, then)]
                    shares[at] = shares.get(at, 0.0) + moved
                    rest, left[then] = rest - moved, left[then] - moved
        total = sum(shares.values())
        every.append({at: share / total for at, share in shares.items()})
    return Assignment(tuple(every))


def _buckets(instance: Instance, index: _Index, rows: Rows) -> None:
    """Every slice is served, once; what is prefilled is decoded."""
    slices = instance.slices or 1
    starts = instance.by_role("mixed") + instance.by_role("prefill")
    for bucket in range(instance.buckets):
        rows.add([(index.part(bucket, g), 1.0) for g in starts], slices, slices)
        apart = [(index.part(bucket, g), 1.0) for g in instance.by_role("prefill")]
        apart += [(index.part(bucket, g), -1.0) for g in instance.by_role("decode")]
        if apart:
            rows.add(apart, 0, 0)


def _capacity(instance: Instance, index: _Index, rows: Rows) -> None:
    slices = instance.slices or 1
    for group, loads in enumerate(instance.loads):
        terms = [
            (index.part(b, group), float(load) / slices)
            for b, load in enumerate(loads)
            if np.isfinite(load)
        ]
        rows.add(terms + [(c, -1.0) for c in index.all_bought(group)], -np.inf, 0)
    for pool in instance.pools:
        weight_of = dict(zip(pool.columns, pool.weights, strict=True))
        drawn = [
            (index.bought(g, t), float(weight_of[tier.column]))
            for g, t, tier in index.tiers
            if tier.column in weight_of
        ]
        rows.add(drawn, 0, pool.most)


def _linking(instance: Instance, index: _Index, rows: Rows) -> None:
    slices = instance.slices or 1
    for group, loads in enumerate(instance.loads):
        for bucket, load in enumerate(loads):
            if load < 1:
                bought = [(c, -float(slices)) for c in index.all_bought(group)]
                rows.add([(index.part(bucket, group), 1.0), *bought], -np.inf, 0)


def _covering(instance: Instance, index: _Index, rows: Rows) -> None:
    """sum_g ceil(w_g / w_j) y_g >= ceil(demand / w_j) for each j: w y >= demand holds for every
    plan, and the left side is whole."""
    weights = instance.cheapest
    demand = float(weighted_demand(instance, weights[None])[0][0])
    for unit in sorted({float(w) for w in weights if w > 0}):
        terms = [
            (column, float(np.ceil(weights[group] / unit - 1e-9)))
            for group in range(len(instance.groups))
            for column in index.all_bought(group)
        ]
        rows.add(terms, float(np.ceil((1 - TOLERANCE) * demand / unit - TOLERANCE)), np.inf)


def _bounds(instance: Instance, index: _Index, units: Integers | None) -> tuple[Floats, Floats]:
    slices = instance.slices or 1
    able = np.where(np.isfinite(instance.loads.T), float(slices), 0.0).ravel()
    low = np.zeros(index.columns)
    high = np.concatenate([able, np.zeros(len(index.tiers))])
    for group, place, tier in index.tiers:
        column = index.bought(group, place)
        high[column] = min(tier.most, instance.groups[group].most)
        if units is not None:
            first = place == 0
            low[column] = high[column] = float(units[group]) if first else 0.0
    return low, high
