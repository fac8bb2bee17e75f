"""From a target availability to the price of being short: the multiplier of the constraint, found
by replaying the history that the risk model was learnt from. Nothing later is looked at.
"""

from collections.abc import Callable
from typing import NamedTuple

from autoscale.spot.mixed import MixedPolicy

PRICES = (1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0)


class Outcome(NamedTuple):
    """What a policy came to over the history."""

    availability: float
    cost: float


def calibrate(target: float, outcome: Callable[[MixedPolicy], Outcome]) -> MixedPolicy:
    """The policy of the least price of `PRICES` that met the target over the history, by bisection
    (dearer shortage never buys less). ValueError when none meets it; the best is named."""
    if not 0 < target <= 1:
        raise ValueError(f"target availability is {target}; it lies above 0 and at most at 1")
    low, high, best = 0, len(PRICES), 0.0
    while low < high:
        middle = (low + high) // 2
        reached = outcome(MixedPolicy(PRICES[middle])).availability
        best = max(best, reached)
        if reached >= target:
            high = middle
        else:
            low = middle + 1
    if low == len(PRICES):
        raise ValueError(
            f"target availability {target} was not met over the history by any price of being "
            f"short; the most was {best:.4f}"
        )
    return MixedPolicy(PRICES[low])
