"""Integer operations: exact where they say so, within the papers' errors of float64 elsewhere, and
no overflow at the ends of what they accept (oracles in Python's unbounded integers)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import integer

TOP = (1 << 31) - 1
INT32 = st.integers(-TOP, TOP)
EXPONENT = 1 << integer.EXP_POINT


def exactly(value: int, shift: int) -> int:
    """value / 2^shift, halves up."""
    return (2 * value + (1 << shift)) >> (shift + 1)


def clipped(value: int, most: int = TOP) -> int:
    return max(-most, min(most, value))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def drawn(*shape: int, most: int = TOP, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=random, dtype=torch.int32)


def all_exponents() -> torch.Tensor:
    """Every number at point 14 in -32..32."""
    return torch.arange(-32 * EXPONENT, 32 * EXPONENT + 1, dtype=torch.int32)


def test_the_machine_s_products_are_exact(monkeypatch: pytest.MonkeyPatch):
    assert integer.products_are_exact()

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        left, right = a.int().view(len(a), 1, -1, 2), b.int().t().reshape(1, b.shape[1], -1, 2)
        sums: torch.Tensor = (left * right).sum(-1).clamp(max=32767).sum(-1)
        return sums.int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not integer.products_are_exact()


@given(st.lists(st.integers(0, (1 << 62) + 5), min_size=1, max_size=20))
def test_bit_lengths(values: list[int]):
    made = integer.bit_length(torch.tensor(values))
    assert made.tolist() == [value.bit_length() for value in values]


@given(st.integers(-(1 << 62) + 1, (1 << 62) - 1), st.integers(0, 62))
def test_shifts_round_halves_up(value: int, shift: int):
    wanted = exactly(value, shift)
    assert integer.round_shift(torch.tensor([value]), shift).tolist() == [wanted]
    assert integer.round_shift(torch.tensor([value]), torch.tensor([shift])).tolist() == [wanted]


@given(INT32, st.integers(-(1 << 30), 1 << 30), st.integers(0, 62))
def test_requantisation_is_the_rounded_saturated_product(value: int, multiplier: int, shift: int):
    made = integer.requantise(ints(value), ints(multiplier), shift)
    assert made.dtype == torch.int32
    assert made.tolist() == [clipped(exactly(value * multiplier, shift))]


@given(st.integers(-16383, 16383))
def test_a_pair_holds_15_bits(value: int):
    high, low = integer.split(ints(value))
    assert high.dtype == low.dtype == torch.int8
    assert 128 * int(high) + int(low) == value and int(low) >= 0


@given(st.lists(st.integers(-(1 << 31), TOP), min_size=1, max_size=8))
def test_quantisation_keeps_15_bits_of_a_row_s_largest(values: list[int]):
    made, shift = integer.quantise(ints(*values)[None])
    step, largest = 1 << int(shift), max(map(abs, values))
    assert step == 1 or largest >= 8192 * step, "a finer step would do"
    for value, short in zip(values, made[0].tolist(), strict=True):
        assert abs(short) <= 16383
        assert abs(value - short * step) <= (step // 2 if abs(short) < 16383 else step)


@pytest.mark.parametrize("terms", [1, 576, 1536, integer.MOST_TERMS])
@pytest.mark.parametrize("value", [1, -16384, TOP, -TOP])
@pytest.mark.parametrize("shift", [integer.LEAST_LINEAR_SHIFT, 40, 62])
def test_linear_does_not_overflow(terms: int, value: int, shift: int):
    weight = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, terms).contiguous()
    multipliers = ints(1 << 24, (1 << 23) + 1)
    made = integer.linear(ints(value).expand(1, terms), weight, multipliers, shift, ints(TOP, -TOP))
    short, exponent = (int(part) for part in integer.quantise(ints(value)[None]))
    for got, row, multiplier, bias in zip(
        made[0].tolist(), (-128, 127), multipliers.tolist(), (TOP, -TOP), strict=True
    ):
        sums = short * row * terms
        assert got == clipped(exactly(sums * multiplier, shift - exponent) + bias)


def test_linear_is_the_product_of_real_numbers():
    """x at point 20, weights of scale 1/1000, result at point 16."""
    x, weight = drawn(3, 5, 96, most=1 << 23), drawn(7, 96, most=127, seed=1).to(torch.int8)
    shift, multiplier = 35, round((1 << 35) * 1e-3 / (1 << 4))
    made = integer.linear(x, weight, ints(multiplier).expand(7), shift)
    wanted = (x.double() / (1 << 20)) @ (weight.double() / 1000).t()
    assert made.shape == (3, 5, 7) and made.dtype == torch.int32
    assert (made.double() / (1 << 16) - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.equal(made[1, 2:4], integer.linear(x[1, 2:4], weight, ints(multiplier), shift))


@pytest.mark.parametrize("terms", [1, 64, 1000])
def test_pair_products_are_exact(terms: int):
    a, b = drawn(5, terms, most=16383), drawn(9, terms, most=16383, seed=1)
    a[0], b[0], b[1] = 16383, 16383, -16383
    assert torch.equal(integer.pair_product(a, b), a.long() @ b.long().t())


def test_exp_is_within_i_bert_s_error_and_monotone():
    x = torch.arange(integer.LEAST_EXPONENT - 1000, 1, dtype=torch.int32)
    made = integer.exp(x)
    error = (made.double() / integer.EXP_ONE - (x.double() / EXPONENT).exp()).abs().max()
    assert made.dtype == torch.int32 and made[-1] == integer.EXP_ONE < 1 << 30
    assert error <= 1.95e-3  # the paper says 1.9e-3
    assert bool((made >= 0).all()) and integer.exp(ints(-TOP)).item() == 0
    # Where one power of two ends and the next begins the quadratic drops by 3e-4 of its value.
    assert bool((made[:-1].double() <= made[1:].double() * (1 + 4e-4)).all())


def test_sigmoid_and_silu_are_close():
    x = all_exponents()
    real = x.double() / EXPONENT
    sigmoid = integer.sigmoid(x).double() / (1 << 30)
    assert (sigmoid - real.sigmoid()).abs().max() <= 1e-3
    assert integer.sigmoid(ints(0)).item() == 1 << 29
    made = integer.silu(x, integer.EXP_POINT)
    assert made.dtype == torch.int32
    assert (made.double() / EXPONENT - F.silu(real)).abs().max() <= 1e-3


def test_gelu_is_within_i_bert_s_error():
    x = all_exponents()
    real = x.double() / EXPONENT
    made = integer.gelu(x, integer.EXP_POINT)
    assert made.dtype == torch.int32
    assert (made.double() / EXPONENT - F.gelu(real)).abs().max() <= 0.0183  # the paper: 0.018
    polynomial = 1 - 0.2888 * ((real.abs() / math.sqrt(2)).clamp(max=1.769) - 1.769) ** 2
    wanted = real / 2 * (1 + polynomial * real.sign())
    assert (made.double() / EXPONENT - wanted).abs().max() <= 2e-4


@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("point", [14, 20, 24])
def test_activations_at_the_ends_of_int32(name: str, point: int):
    activation = integer.ACTIVATIONS[name]
    x = ints(-TOP, -1, 0, 1, TOP)
    assert activation(x, point).tolist() == [0, 0 if point == 24 else -1 + 1, 0, 1, TOP]
    for up in (TOP, -TOP):
        row = ints(TOP, up)
        for shift in (0, point, 2 * point):
            made = integer.gated(row, name, point, shift)
            assert made.tolist() == [clipped(exactly(TOP * up, shift))]


@given(st.integers(0, 1 << 62))
def test_roots_are_exact_floors(value: int):
    assert integer.isqrt(torch.tensor([value])).tolist() == [math.isqrt(value)]


@given(st.integers(1, 1 << 31), st.sampled_from([-1, 0, 1]))
def test_roots_next_to_squares(root: int, beside: int):
    value = min(root * root + beside, 1 << 62)
    assert integer.isqrt(torch.tensor([value])).tolist() == [math.isqrt(value)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 30000.0])
@pytest.mark.parametrize("size", [1, 17, 576])
def test_rms_norm_is_close(scale: float, size: int):
    """x at point 16, result at point 24."""
    random = torch.Generator().manual_seed(size)
    real = torch.randn(6, size, generator=random, dtype=torch.float64) * scale
    x = (real * (1 << 16)).round().clamp(-TOP, TOP).int()
    weight = torch.rand(size, generator=random, dtype=torch.float64) * 3
    whole = (weight * math.sqrt(size) * (1 << 14)).round().int()
    made = integer.rms_norm(x, whole, round(size * 1e-5 * (1 << 32)), 30 + 14 - 24)
    wanted = F.rms_norm(x.double() / (1 << 16), (size,), weight, 1e-5)
    assert made.dtype == torch.int32
    assert (made.double() / (1 << 24) - wanted).abs().max() < 2e-4 * wanted.abs().max()


@pytest.mark.parametrize("size", [1, 1 << 16])
@pytest.mark.parametrize("value", [0, 1, TOP])
@pytest.mark.parametrize("epsilon", [1, 1 << 60])
def test_rms_norm_does_not_overflow(size: int, value: int, epsilon: int):
    x = ints(value, -value).repeat(2, size)[:, :size]
    made = integer.rms_norm(x, ints(1 << 24).expand(size), epsilon, 30)
    excess = max(0, value.bit_length() - 22)
    kept = exactly(value, excess)
    total = size * kept * kept + (epsilon >> 2 * excess)
    assert abs(int(made[0, 0]) - kept / math.sqrt(total) * (1 << 24)) <= 1 + kept * 2e-9
    assert torch.equal(made[0], made[1])


def test_rotation_is_close_and_does_not_overflow():
    """x at point 20 -> point 6."""
    angles = torch.arange(5, dtype=torch.float64)[:, None, None] * torch.rand(4).double()
    cos, sin = ((each * (1 << 15)).round().int() for each in (angles.cos(), angles.sin()))
    x = drawn(5, 3, 8, most=100 << 20)
    made = integer.rotate(x, cos, sin, 15 + 20 - 6)
    first, second = (x.double() / (1 << 20)).chunk(2, -1)
    wanted = torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        -1,
    )
    assert (made.double() / 64 - wanted).abs().max() <= 0.5 / 64 + 100 * 2**-14
    ends = integer.rotate(ints(TOP, -TOP)[None, None], ints(1 << 15), ints(1 << 15), 32)
    assert ends.tolist() == [[[16383, 0]]]


@given(st.lists(st.tuples(INT32, st.booleans()), min_size=1, max_size=30), st.integers(0, 1 << 20))
def test_probabilities(row: list[tuple[int, bool]], offset: int):
    scores, visible = (torch.tensor([part]) for part in zip(*row, strict=True))
    scores = scores.int() // 2
    made = integer.softmax(scores, visible)
    assert made.dtype == torch.int32 and bool((made >= 0).all())
    assert bool((made[~visible] == 0).all())
    total = int(made.sum())
    assert (1 << 30) - len(row) <= total <= 1 << 30 if any(visible[0]) else total == 0
    assert torch.equal(integer.softmax(scores + offset, visible), made)


def test_softmax_is_close():
    scores = drawn(50, 200, most=12 * EXPONENT)
    made = integer.softmax(scores, torch.ones_like(scores, dtype=torch.bool))
    wanted = (scores.double() / EXPONENT).softmax(-1)
    assert (made.double() / (1 << 30) - wanted).abs().max() < 2e-3
    assert (made.double() / (1 << 30) - wanted).abs().sum(-1).max() < 4e-3


def heads(*shape: int, seed: int) -> torch.Tensor:
    return drawn(*shape, most=16383, seed=seed)


def test_attention_is_that_of_real_numbers():
    """q at point 11, k at point 10, v at point 12, so scores need a shift by 7 and 1 / sqrt 16."""
    q, k, v = heads(9, 4, 16, seed=1), heads(9, 2, 16, seed=2), heads(9, 2, 16, seed=3)
    made = integer.attention(q, k, v, 1 << 23, 23 + 7 + 2)
    query, key, value = (x.double().transpose(0, 1) for x in (q / 2048, k / 1024, v / 4096))
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    error = made.double() / (1 << 20) - wanted.transpose(0, 1)
    assert made.dtype == torch.int32 and error.abs().max() < 4 * 4e-3


def test_attention_sees_no_later_token_and_no_other_head():
    q, k, v = heads(9, 4, 16, seed=1), heads(9, 2, 16, seed=2), heads(9, 2, 16, seed=3)
    whole = integer.attention(q, k, v, 1 << 23, 32)
    assert torch.equal(integer.attention(q[5:7], k[:7], v[:7], 1 << 23, 32), whole[5:7])
    k[8], v[:, 1] = 0, 0
    other = integer.attention(q, k, v, 1 << 23, 32)
    assert torch.equal(other[:8, :2], whole[:8, :2]) and not torch.equal(other[8], whole[8])
    assert bool((other[:, 2:] == 0).all())


def test_attention_does_not_overflow():
    most = torch.full((300, 1, 16), 16383, dtype=torch.int32)
    for sign in (1, -1):
        made = integer.attention(sign * most, most, -most, 1 << 24, 0)
        assert ((made + (16383 << 8)).abs() <= 16383 << 8 >> 12).all()
