"""QSGD against its two theorems, and its codes against plain ones written bit by bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.communication import elias
from train.communication.compressor import seeded
from train.communication.qsgd import (
    STRETCH,
    decode,
    dequantise,
    encode,
    quantise,
)

DRAWS = 1000


def gamma(numbers: list[int]) -> str:
    """Elias's gamma of |n| + 1, one number after another, with a sign where there is one."""
    code = ""
    for number in numbers:
        digits = bin(abs(number) + 1)[2:]
        code += "0" * (len(digits) - 1) + digits
        code += "" if number == 0 else str(int(number < 0))
    return code


def plainly(code: str, count: int) -> list[int]:
    """The numbers of such a code."""
    numbers, at = [], 0
    for _ in range(count):
        zeros = code.index("1", at) - at
        value = int(code[at + zeros : at + 2 * zeros + 1], 2) - 1
        at += 2 * zeros + 1
        if value:
            value, at = (-value if code[at] == "1" else value), at + 1
        numbers.append(value)
    assert at == len(code)
    return numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**20), 2**20), max_size=70))
def test_codes_are_gammas_and_are_read_back(numbers: list[int]):
    whole = np.array(numbers, dtype=np.int32)
    code = elias.encode(whole)
    plain = gamma(numbers)
    assert plainly(plain, len(numbers)) == numbers
    assert elias.bits_of(whole) == len(plain)
    filling = 8 * (len(code) - elias.HEADER.itemsize) - len(plain)
    assert 0 <= filling < 3 * 8
    assert elias.decode(code, len(numbers)).tolist() == numbers


def normal(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_payloads_are_decoded_exactly(bits: int, count: int):
    """Whichever way they are written; a peaked vector takes Elias's codes, a flat one is packed."""
    levels = (1 << (bits - 1)) - 1
    peaked = torch.zeros(count, dtype=torch.float64)
    peaked[0] = -3.0
    for values in (normal(count), peaked, torch.zeros(count)):
        numbers, norms = quantise(values, levels, seeded(1))
        payload = encode(numbers, norms, bits)
        filled = np.concatenate([payload, np.zeros(9, dtype=np.uint8)])
        found, found_norms = decode(filled, count, bits)
        assert (found == numbers).all() and (found_norms == norms).all()
        assert np.abs(numbers).max() <= levels
        assert len(payload) <= 1 + 4 * math.ceil(count / STRETCH) + bits * count / 8 + 20


def test_both_ways_of_writing_are_used():
    flat = np.full(STRETCH, 7, dtype=np.int32)
    norms = np.ones(1, dtype=np.float32)
    packed, coded = encode(flat, norms, 4), encode(flat * 0, norms, 4)
    assert packed[0] != coded[0]
    assert len(packed) == 5 + STRETCH // 2 and len(coded) < 5 + STRETCH // 4


def draws(levels: int, nearest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of one stretch, and what they became in each of many draws: (draws, STRETCH)."""
    values = normal(STRETCH, seed=5)
    rows = []
    for draw in range(DRAWS):
        numbers, norms = quantise(values, levels, seeded("draw", draw))
        if nearest:
            numbers = (values / float(norms[0]) * levels).round().numpy().astype(np.int32)
        rows.append(dequantise(numbers, norms, levels, torch.float64))
    return values, torch.stack(rows)


def sigmas(values: torch.Tensor, found: torch.Tensor) -> float:
    """How far the mean error over all values is from nothing, in its standard deviations: projected
    on the values themselves, where rounding towards something would show."""
    errors = (found - values) @ (values / values.norm())
    deviation = float(errors.std()) / math.sqrt(len(errors))
    return abs(float(errors.mean())) / max(deviation, 1e-12)


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_the_mean_is_the_value(levels: int):
    """Lemma 3.1 (i): within 4 sigma, in projection, and for each value alone (512 of them: 5)
    whose rounding goes either way often enough to be normal."""
    values, found = draws(levels)
    assert sigmas(values, found) < 4
    step = float(values.norm()) / levels
    up = (values.abs() / step).frac()
    often = DRAWS * up * (1 - up) > 10
    deviation = step * (up * (1 - up) / DRAWS).sqrt()
    each = (found.mean(0) - values).abs()[often] / deviation[often]
    assert len(each) > 200 and float(each.max()) < 5


def test_rounding_to_nearest_is_not_unbiased():
    """The mutation: what has no chance in it has the same error each time."""
    values, found = draws(7, nearest=True)
    assert sigmas(values, found) > 100


@pytest.mark.parametrize("levels", [1, 7, 23, 127])
def test_the_variance_is_below_its_bound(levels: int):
    """Lemma 3.1 (ii): at most min(n / s^2, sqrt(n) / s) times the squared norm."""
    values, found = draws(levels)
    variance = float((found - values).square().sum(1).mean())
    bound = min(STRETCH / levels**2, math.sqrt(STRETCH) / levels)
    assert 0 < variance <= bound * float(values.square().sum())


def expected_bits(spread: float) -> float:
    """Of a normal value that is so many levels wide, rounded at random: by integration."""
    x = np.linspace(0, 8, 80_001)
    density = 2 * np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    lower = np.floor(x * spread).astype(int)
    up = x * spread - lower

    def length(level: int) -> int:
        return len(gamma([level]))

    table = np.array([length(level) for level in range(lower.max() + 2)])
    return float((density * ((1 - up) * table[lower] + up * table[lower + 1])).sum())


@pytest.mark.parametrize("levels", [3, 22, 127])
def test_codes_are_as_long_as_expected(levels: int):
    lengths = []
    for draw in range(100):
        numbers, _ = quantise(normal(STRETCH, draw), levels, seeded(draw))
        lengths.append(elias.bits_of(numbers) / STRETCH)
    assert np.mean(lengths) == pytest.approx(expected_bits(levels / math.sqrt(STRETCH)), rel=0.02)


def test_a_gradient_that_is_no_number_stays_none():
    values = normal(2 * STRETCH)
    values[3] = math.nan
    numbers, norms = quantise(values, 7, seeded(0))
    found = dequantise(*decode(encode(numbers, norms, 4), len(values), 4), 7, torch.float64)
    assert found[:STRETCH].isnan().all() and found[STRETCH:].isfinite().all()
