"""How many bits each saved tensor gets: the exact best, not a greedy one (GACT's problem)."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def variance(bits: int) -> float:
    """Of rounding by chance to `bits` bits, as a share of that to one bit: steps are 2**bits - 1
    times finer (Liu et al. 2022, section 4)."""
    return 1.0 / ((1 << bits) - 1) ** 2


def allocate(
    sensitivity: Mapping[str, float],
    elements: Mapping[str, int],
    mean_bits: float,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, int]:
    """Bits by tensor with the least sum of sensitivity x variance(bits) within mean_bits x all
    elements. Of equal sums the one with fewer bits.

    Every total of bits that can be reached keeps its best choice (a knapsack by dominance,
    Nemhauser and Ullmann 1969), so the answer is exact; sizes of a transformer's tensors are few,
    and so are the totals. ValueError when even the fewest bits are too many.
    """
    limit = mean_bits * sum(elements.values())
    rest = min(widths) * sum(elements.values())
    if rest > limit:
        raise ValueError(f"bits = {mean_bits}: at least {min(widths)} are accepted")
    bits, shares = np.array(widths), np.array([variance(width) for width in widths])
    used, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Whole, Whole]] = []
    for name, count in elements.items():
        rest -= min(widths) * count
        totals = (used[:, None] + bits * count).ravel()
        costs = (cost[:, None] + sensitivity[name] * shares).ravel()
        kept = _undominated(totals, costs, limit - rest)
        used, cost = totals[kept], costs[kept]
        steps.append((kept // len(bits), bits[kept % len(bits)]))
    return dict(zip(elements, _walk_back(steps), strict=True))


def _undominated(totals: Whole, costs: npt.NDArray[np.float64], limit: float) -> Whole:
    """Places of those within the limit that no other beats with as few bits, by rising bits and
    falling costs."""
    order = np.lexsort((costs, totals))
    order = order[totals[order] <= limit]
    least = np.minimum.accumulate(costs[order])
    falls = np.ones(len(order), bool)
    falls[1:] = least[1:] < least[:-1]
    return order[falls]


def _walk_back(steps: list[tuple[Whole, Whole]]) -> list[int]:
    """The widths that led to the last, cheapest state; a step: where each state came from, and by
    which width."""
    place, found = len(steps[-1][0]) - 1, []
    for came_from, width in reversed(steps):
        found.append(int(width[place]))
        place = int(came_from[place])
    return found[::-1]
