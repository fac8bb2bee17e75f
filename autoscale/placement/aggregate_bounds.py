"""What a price for load proves. For weights w >= 0 on the groups' capacity, counts y of machines can
carry the demand only if  sum_g w_g y_g >= sum_b (least weighted load of bucket b):  the dual of the
transportation problem, so one vector w throws out every count on its wrong side at once, and w = prices
is a lower bound on the cost. Weights are improved by multiplicative steps, for many counts together;
every vector on the way is a proof already, so nothing rests on convergence."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscale.placement.aggregate_model import TOLERANCE, Floats, Instance, Integers

ABSENT = 1e9  # the weight of a group that is not there
STEPS = 40


@dataclass(frozen=True)
class Proofs:
    """weights [n, group] and the demand [n] that each of them finds."""

    weights: Floats
    demand: Floats

    def refute(self, units: Integers) -> NDArray[np.bool_]:
        """For rows of counts: True where a proof shows that they cannot carry the demand."""
        if not len(self.demand):
            return np.zeros(len(units), dtype=np.bool_)
        carried = units @ self.weights.T
        slack = TOLERANCE * self.weights.sum(axis=1)
        return np.asarray((carried + slack < self.demand).any(axis=1))


def weighted_demand(instance: Instance, weights: Floats) -> tuple[Floats, Floats]:
    """For rows of weights: the least weighted load of all buckets [n], and which units [n, group]
    carry it so."""
    with np.errstate(invalid="ignore"):
        priced = weights[:, :, None] * instance.loads
    least: list[Floats] = []
    chosen: dict[str, NDArray[np.int64]] = {}
    for role in ("mixed", "prefill", "decode"):
        groups = instance.by_role(role)
        chosen[role], value = _least(priced, groups)
        least.append(value)
    apart = least[1] + least[2]
    mixed = least[0] <= apart
    used = np.zeros_like(weights)
    for role, taken in (("mixed", mixed), ("prefill", ~mixed), ("decode", ~mixed)):
        rows, buckets = np.nonzero(taken & (chosen[role] >= 0))
        groups_of = chosen[role][rows, buckets]
        np.add.at(used, (rows, groups_of), instance.loads[groups_of, buckets])
    return np.minimum(least[0], apart).sum(axis=1), used


def price_bound(instance: Instance) -> float:
    """No plan costs less, $/h: every bucket at its cheapest, machines in fractions. inf where some
    bucket cannot be served at all."""
    return float(weighted_demand(instance, instance.cheapest[None])[0][0])


def ascend(instance: Instance, units: Integers) -> tuple[Proofs, Floats]:
    """Look for a proof against each row of counts; the proofs that hold, and the last weights of
    every row, which say which group is short."""
    present = units > 0
    weights = np.where(present, np.maximum(instance.cheapest, 1e-9), ABSENT)
    best = np.full(len(units), -np.inf)
    kept = weights.copy()
    for step in range(STEPS):
        demand, used = weighted_demand(instance, weights)
        scale = np.where(present, weights, 0).sum(axis=1)
        scale[scale == 0] = 1
        with np.errstate(invalid="ignore"):
            value = (demand - (weights * units).sum(axis=1)) / scale
        better = value > best
        best[better], kept[better] = value[better], weights[better]
        # Short of what it is asked to carry: dearer. The step shrinks as in subgradient methods.
        excess = np.where(present, (used - units) / np.maximum(units, 1), 0)
        weights = weights * np.exp(np.clip(excess, -1, 1) * (0.7 / (1 + 0.15 * step)))
    proved = best > TOLERANCE
    found = kept[proved]
    demand = weighted_demand(instance, found)[0] if len(found) else np.zeros(0)
    return Proofs(found, np.minimum(demand, ABSENT)), kept


def _least(priced: Floats, groups: list[int]) -> tuple[NDArray[np.int64], Floats]:
    """Of each row and bucket the group of least value (-1: none can) and that value."""
    rows, _, buckets = priced.shape
    if not groups:
        return np.full((rows, buckets), -1), np.full((rows, buckets), np.inf)
    among = priced[:, groups]
    at = among.argmin(axis=1)
    value = np.take_along_axis(among, at[:, None], axis=1)[:, 0]
    return np.where(np.isfinite(value), np.array(groups)[at], -1), value
