"""Packed bits, ranges, and rounding by chance: right on average, and only because of the chance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.memory import codec
from train.memory.codec import GROUP, encode, grid_between
from train.memory.packing import pack, unpack


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 1 << 30))
def test_bits_come_back(bits: int, count: int, seed: int):
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(values.to(torch.uint8), bits)
    size = count if bits == 8 else -(-count // 8) * bits
    assert packed.untyped_storage().nbytes() == size == packed.numel()
    assert unpack(packed, bits, count).tolist() == values.tolist()


def test_bits_are_where_they_are_said_to_be():
    """Eight numbers as one little-endian word, by Python's own integers."""
    values = [5, 0, 7, 1, 2, 6, 3, 4]
    word = sum(value << (3 * place) for place, value in enumerate(values))
    packed = pack(torch.tensor(values, dtype=torch.uint8), 3)
    assert bytes(packed.tolist()) == word.to_bytes(3, "little")


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match="1 to 8"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_numbers_come_back_within_a_step(bits: int, dtype: torch.dtype):
    flat = torch.randn(3 * GROUP + 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = encode(flat, bits, torch.Generator().manual_seed(0)).decode()
    assert found.dtype == dtype and found.shape == flat.shape
    for first in range(0, len(flat), GROUP):
        part, back = flat[first : first + GROUP].double(), found[first : first + GROUP].double()
        step = float(part.max() - part.min()) / (2**bits - 1)
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert float((part - back).abs().max()) <= step * (1 + 1e-5) + rounding * 4


def test_a_range_holds_what_it_was_made_of():
    """float32 ranges of float64 numbers: nothing is cut off, so nothing is pulled to one side."""
    low = torch.tensor([0.1, -1 / 3, 5.0], dtype=torch.float64)
    high = low + torch.tensor([1e-9, 2.0, 0.0], dtype=torch.float64)
    for bits in (1, 8):
        grid = grid_between(low, high, bits, 4)
        top = grid.low.double() + grid.step.double() * (2**bits - 1)
        assert bool((grid.low.double() <= low).all()) and bool((top >= high).all())


def mean_error(draws: int, bits: int) -> float:
    """Root mean square distance of the mean of draws, in steps."""
    flat = torch.rand(GROUP * 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros_like(flat)
    for _ in range(draws):
        total += encode(flat, bits, generator).decode()
    off = (total / draws - flat).square().mean().sqrt()
    return float(off) * ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_the_mean_of_draws_nears_the_number(bits: int):
    few, many = mean_error(4, bits), mean_error(1024, bits)
    assert few / many == pytest.approx(math.sqrt(1024 / 4), rel=0.1)


def test_rounding_to_the_nearest_does_not(monkeypatch: pytest.MonkeyPatch):
    """The mutation: no chance."""
    monkeypatch.setattr(codec, "noise", lambda like, _: torch.full_like(like, 0.5))
    assert mean_error(64, 2) > 0.9 * mean_error(1, 2) > 0.1
