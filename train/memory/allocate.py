"""How many bits each saved tensor gets: the exact best, not a greedy one (GACT's problem)."""

from collections.abc import Mapping, Sequence

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
    least = min(widths) * sum(elements.values())
    if least > limit:
        raise ValueError(f"bits = {mean_bits}: at least {min(widths)} are accepted")
    rest = least
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for name, count in elements.items():
        rest -= min(widths) * count
        reached = [
            (used + bits * count, cost + sensitivity[name] * variance(bits), (*chosen, bits))
            for used, cost, chosen in front
            for bits in widths
            if used + bits * count + rest <= limit
        ]
        front = _undominated(reached)
    return dict(zip(elements, front[-1][2], strict=True))


def _undominated(
    reached: list[tuple[int, float, tuple[int, ...]]],
) -> list[tuple[int, float, tuple[int, ...]]]:
    """Those that no other beats with as few bits, by rising bits and falling cost."""
    kept: list[tuple[int, float, tuple[int, ...]]] = []
    for state in sorted(reached):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept
