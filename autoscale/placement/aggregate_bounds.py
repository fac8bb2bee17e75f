"""What a price for load proves. For weights w >= 0 on the groups' capacity, counts y of machines
can carry the demand only if  sum_g w_g y_g >= sum_b (least weighted load of bucket b):  the dual of
the transportation problem, so one vector w throws out every count on its wrong side at once, and w
= prices is a lower bound on the cost. Weights are improved by multiplicative steps, for many counts
together; every vector on the way is a proof already, so nothing rests on convergence.

`refuted_by_slices` knows more: how many whole slices of a bucket fit on the machines of one group.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscale.placement.aggregate_model import TOLERANCE, Floats, Instance, Integers

ABSENT = 1e9  # the weight of a group that is not there
STEPS = 30


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

    def and_those(self, other: "Proofs") -> "Proofs":
        return Proofs(
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.demand, other.demand]),
        )


def weighted_demand(instance: Instance, weights: Floats) -> tuple[Floats, Floats]:
    """For rows of weights: the least weighted load of all buckets [n], and which units [n, group]
    carry it so."""
    priced = weights[:, :, None] * instance.loads
    mixed, of_mixed = _least(priced, instance, "mixed")
    if instance.apart:
        first, of_first = _least(priced, instance, "prefill")
        then, of_then = _least(priced, instance, "decode")
        together = (mixed <= first + then)[:, None]
        chosen = np.where(together, of_mixed, of_first | of_then)
        mixed = np.minimum(mixed, first + then)
    else:
        chosen = of_mixed
    used = np.where(chosen, instance.finite_loads, 0.0).sum(axis=2)
    return mixed.sum(axis=1), used


def price_bound(instance: Instance) -> float:
    """No plan costs less, $/h: every bucket at its cheapest, machines in fractions. inf where some
    bucket cannot be served at all."""
    return float(weighted_demand(instance, instance.cheapest[None])[0][0])


def ascend(instance: Instance, units: Integers) -> tuple[Proofs, Floats]:
    """Look for a proof against each row of counts; the proofs that hold, and the best weights of
    every row, which say which group is short."""
    present = units > 0
    weights = np.where(present, np.maximum(instance.cheapest, 1e-9), ABSENT)
    best = np.full(len(units), -np.inf)
    kept = weights.copy()
    for step in range(STEPS):
        demand, used = weighted_demand(instance, weights)
        scale = np.maximum(np.where(present, weights, 0).sum(axis=1), 1e-9)
        value = (demand - (weights * units).sum(axis=1)) / scale
        better = value > best
        best[better], kept[better] = value[better], weights[better]
        if (best > 2 * TOLERANCE).all():
            break
        # Short of what it is asked to carry: dearer. The step shrinks as in subgradient methods.
        excess = np.where(present, (used - units) / np.maximum(units, 1), 0)
        weights = weights * np.exp(np.clip(excess, -1, 1) * (0.7 / (1 + 0.15 * step)))
    proved = best > 2 * TOLERANCE
    found = kept[proved]
    demand = weighted_demand(instance, found)[0] if len(found) else np.zeros(0)
    return Proofs(found, np.minimum(demand, ABSENT)), kept


def refuted_by_slices(instance: Instance, units: Integers, weights: Floats) -> NDArray[np.bool_]:
    """For rows of counts and weights to begin with: True where whole slices, no more of them on a
    group than fit there, are proved not to. Groups of mixed role alone; nothing else is refuted."""
    refuted = np.zeros(len(units), dtype=np.bool_)
    if instance.slices is None or instance.apart or not len(units):
        return refuted
    slice_loads = instance.loads / instance.slices
    fits = np.floor((units + TOLERANCE)[:, :, None] / slice_loads)
    most = np.minimum(fits, instance.slices)
    refuted |= (most.sum(axis=1) < instance.slices).any(axis=1)
    weights = np.where(units > 0, np.minimum(weights, ABSENT), 0.0)
    for step in range(STEPS):
        demand, used = _sliced_demand(instance, slice_loads, most, weights)
        slack = TOLERANCE * weights.sum(axis=1)
        refuted |= demand > (weights * units).sum(axis=1) + slack * 2
        if refuted.all():
            break
        excess = np.where(units > 0, (used - units) / np.maximum(units, 1), 0)
        weights = weights * np.exp(np.clip(excess, -1, 1) * (0.4 / (1 + 0.15 * step)))
    return refuted


def _sliced_demand(
    instance: Instance, slice_loads: Floats, most: Floats, weights: Floats
) -> tuple[Floats, Floats]:
    """As `weighted_demand`, with at most so many slices of a bucket on a group: cheapest first."""
    slices = float(instance.slices or 1)
    each = np.where(np.isfinite(slice_loads), slice_loads, 0.0)
    priced = np.where(most > 0, weights[:, :, None] * each, np.inf)
    order = priced.argsort(axis=1)
    room = np.take_along_axis(most, order, axis=1)
    before = np.cumsum(room, axis=1) - room
    taken = np.clip(slices - before, 0, room)
    placed = np.zeros_like(taken)
    np.put_along_axis(placed, order, taken, axis=1)
    used = (placed * each).sum(axis=2)
    return (used * weights).sum(axis=1), used


def _least(priced: Floats, instance: Instance, role: str) -> tuple[Floats, NDArray[np.bool_]]:
    """Of each row and bucket the least value among groups of the role, and which group has it
    [n, group, bucket]."""
    masked = priced + instance.not_of(role)
    least = masked.min(axis=1)
    at = masked.argmin(axis=1)
    chosen = np.arange(masked.shape[1])[:, None] == at[:, None, :]
    return least, chosen
