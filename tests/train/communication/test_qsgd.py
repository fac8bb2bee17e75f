"""QSGD against its two theorems, and its codes against plain ones written bit by bit."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.communication import elias
from train.communication.compressor import seeded
from train.communication.qsgd import (
    CODES,
    PACKED,
    STRETCH,
    decode,
    dequantise,
    encode,
    quantise,
)

DRAWS = 1000


def digits(value: int) -> str:
    """Elias's gamma of a number from 1 on."""
    binary = bin(value)[2:]
    return "0" * (len(binary) - 1) + binary


def sign(number: int) -> str:
    return "" if number == 0 else str(int(number < 0))


def gamma(numbers: list[int]) -> str:
    """Elias's gamma of |n| + 1, one number after another, with a sign where there is one."""
    return "".join(digits(abs(number) + 1) + sign(number) for number in numbers)


def sparse(numbers: list[int]) -> str:
    """Of what is not zero: gamma of the distance from the one before, and of |n|, and a sign."""
    code, last = "", -1
    for place, number in enumerate(numbers):
        if number:
            code += digits(place - last) + digits(abs(number)) + sign(number)
            last = place
    return code


def unary(numbers: list[int]) -> str:
    """|n| zeros, a one, and a sign where there is one."""
    return "".join("0" * abs(number) + "1" + sign(number) for number in numbers)


def omega(value: int) -> str:
    """Elias's recursive code of a number from 1 on, which the paper takes."""
    code = "0"
    while value > 1:
        code = bin(value)[2:] + code
        value = value.bit_length() - 1
    return code


def papers(numbers: list[int]) -> str:
    """QSGD's code for about sqrt(n) levels: a sign for each number, and omega of |n| + 1."""
    return "".join(str(int(number < 0)) + omega(abs(number) + 1) for number in numbers)


def plainly(code: str, count: int) -> list[int]:
    """The numbers of a code of gammas."""
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


PLAIN = {"gamma": gamma, "sparse": sparse, "unary": unary}
OURS = {"gamma": elias.GAMMA, "sparse": elias.SPARSE, "unary": elias.UNARY}


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(-300, 300)), max_size=70))
def test_codes_are_the_plain_ones_and_are_read_back(name: str, numbers: list[int]):
    whole, ours = np.array(numbers, dtype=np.int32), OURS[name]
    code, plain = ours.encode(whole), PLAIN[name](numbers)
    assert name != "gamma" or plainly(plain, len(numbers)) == numbers
    assert ours.bits_of(whole) == len(plain)
    filling = 8 * (len(code) - elias.HEADER.itemsize) - len(plain)
    assert 0 <= filling < 3 * 8
    assert ours.decode(code, len(numbers)).tolist() == numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**20), 2**20), max_size=70))
def test_large_numbers_are_read_back(numbers: list[int]):
    whole = np.array(numbers, dtype=np.int32)
    for ours in (elias.GAMMA, elias.SPARSE):
        assert ours.decode(ours.encode(whole), len(numbers)).tolist() == numbers


def test_no_number_takes_more_than_in_the_papers_code():
    """Up to 126; 127 takes one bit more. So no gradient does, whatever it looks like."""
    numbers = [n for n in range(-126, 127)]
    assert all(len(gamma([n])) <= len(papers([n])) for n in numbers)
    assert len(gamma([127])) == len(papers([127])) + 1
    assert [omega(n) for n in (1, 2, 3, 4, 8, 16)] == [
        "0",
        "100",
        "110",
        "101000",
        "1110000",
        "10100100000",
    ]


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


def test_every_way_of_writing_is_used():
    """Each where it takes least: flat, wide, few, and many small numbers."""
    norms = np.ones(1, dtype=np.float32)
    place = np.arange(STRETCH)
    cases = {
        PACKED: np.full(STRETCH, 7),
        CODES.index(elias.GAMMA): np.where(place % 2, 0, 6),
        CODES.index(elias.SPARSE): np.where(place % 60, 0, 7),
        CODES.index(elias.UNARY): place % 3,
    }
    for how, numbers in cases.items():
        payload = encode(numbers.astype(np.int32), norms, 4)
        assert payload[0] == how
        assert len(payload) <= 5 + STRETCH // 2
        assert (decode(payload, STRETCH, 4)[0] == numbers).all()


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


def expected_bits(spread: float, code: Callable[[list[int]], str] = gamma) -> float:
    """Of a normal value that is so many levels wide, rounded at random: by integration."""
    x = np.linspace(0, 8, 80_001)
    density = 2 * np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    lower = np.floor(x * spread).astype(int)
    up = x * spread - lower
    table = np.array([len(code([level])) for level in range(lower.max() + 2)])
    return float((density * ((1 - up) * table[lower] + up * table[lower + 1])).sum())


@pytest.mark.parametrize("name", ["gamma", "unary"])
@pytest.mark.parametrize("levels", [3, 22, 127])
def test_codes_are_as_long_as_expected(levels: int, name: str):
    lengths = []
    for draw in range(100):
        numbers, _ = quantise(normal(STRETCH, draw), levels, seeded(draw))
        lengths.append(OURS[name].bits_of(numbers) / STRETCH)
    expected = expected_bits(levels / math.sqrt(STRETCH), PLAIN[name])
    assert np.mean(lengths) == pytest.approx(expected, rel=0.02)


def bound(levels: int, count: int) -> float:
    """Theorem 3.2: the expected bits of a vector, whatever it is, its o(1) left out."""
    most = levels * (levels + math.sqrt(count))
    return (3 + 1.5 * math.log2(2 * (levels**2 + count) / most)) * most + 32


def written_bits(levels: int, draws: int = 100) -> dict[str, float]:
    """Of STRETCH normal values, by code, norm included; and of the shortest of each draw."""
    bits: dict[str, list[int]] = {name: [] for name in (*OURS, "least")}
    for draw in range(draws):
        numbers, _ = quantise(normal(STRETCH, draw), levels, seeded(draw))
        each = {name: 32 + code.bits_of(numbers) for name, code in OURS.items()}
        for name, value in (each | {"least": min(each.values())}).items():
            bits[name].append(value)
    return {name: float(np.mean(values)) for name, values in bits.items()}


@pytest.mark.parametrize("levels", [1, 3, 7])
def test_few_levels_take_no_more_than_the_theorem_says(levels: int):
    found = written_bits(levels)
    assert found["least"] <= bound(levels, STRETCH)
    if levels == 1:  # the mutation: every number written
        assert min(found["gamma"], found["unary"]) > bound(levels, STRETCH)


def test_a_gradient_that_is_no_number_stays_none():
    values = normal(2 * STRETCH)
    values[3] = math.nan
    numbers, norms = quantise(values, 7, seeded(0))
    found = dequantise(*decode(encode(numbers, norms, 4), len(values), 4), 7, torch.float64)
    assert found[:STRETCH].isnan().all() and found[STRETCH:].isfinite().all()
