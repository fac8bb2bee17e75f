"""Bits by sensitivity: as good as the best of all choices there are."""

import itertools
import random

import pytest

from train.memory.allocate import WIDTHS, allocate, variance


def brute_force(
    sensitivity: dict[str, float], elements: dict[str, int], limit: float, widths: tuple[int, ...]
) -> float:
    """The least cost of all choices within the limit."""
    costs: list[float] = []
    for chosen in itertools.product(widths, repeat=len(elements)):
        used = sum(bits * count for bits, count in zip(chosen, elements.values(), strict=True))
        if used <= limit:
            pairs = zip(chosen, sensitivity.values(), strict=True)
            costs.append(sum(c / ((1 << bits) - 1) ** 2 for bits, c in pairs))
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
def test_six_tensors_get_the_best_bits(seed: int):
    """Sizes that do not divide each other; sensitivities over six decades."""
    chance = random.Random(seed)
    names = [f"t{n}" for n in range(6)]
    elements = {name: chance.randint(1, 4000) for name in names}
    sensitivity = {name: 10 ** chance.uniform(-6, 0) for name in names}
    widths = (1, 2, 4, 8) if seed % 2 else (1, 2, 3, 5, 6, 8)
    mean = chance.uniform(1, 8)
    limit = mean * sum(elements.values())
    bits = allocate(sensitivity, elements, mean, widths)
    assert sum(bits[name] * elements[name] for name in names) <= limit
    cost = sum(sensitivity[name] * variance(bits[name]) for name in names)
    best = brute_force(sensitivity, elements, limit, widths)
    assert cost == pytest.approx(best, rel=1e-12)
    equal = sum(sensitivity[name] * variance(int(mean)) for name in names)
    assert cost <= equal * (1 + 1e-12) or int(mean) not in widths


def test_what_does_not_matter_gets_one_bit():
    bits = allocate({"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}, 4)
    assert bits == {"a": 7, "b": 1}


def test_fewer_bits_than_there_are_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        allocate({"a": 1.0}, {"a": 10}, 0.5)


def test_many_tensors_are_no_work():
    """A model of 30 layers: totals coincide, since sizes do."""
    chance = random.Random(0)
    names = [f"{layer}/{n}" for layer in range(30) for n in range(14)]
    elements = {name: 256 * chance.choice([576, 192, 1536]) for name in names}
    sensitivity = {name: 10 ** chance.uniform(-3, 0) for name in names}
    bits = allocate(sensitivity, elements, 4, (1, 2, 4, 8))
    used = sum(bits[name] * elements[name] for name in names)
    assert 3.9 * sum(elements.values()) < used <= 4 * sum(elements.values())
    assert set(bits.values()) <= set(WIDTHS)
