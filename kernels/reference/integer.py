"""A decoder's operations in whole numbers: no float is made or read at run time.

After I-BERT (Kim et al., 2021: i-exp, i-GELU, i-sqrt, dyadic requantisation) and I-LLM (Hu et al.,
2024: scales that follow the token, integer RMS norm and SwiGLU). `models/integer.py` builds a
decoder of these; `kernels/triton/integer.py` has the same functions with the same bits.

A number is an int32 tensor and a point: value = integer / 2^point. Points are known when a model is
built; only `quantise` chooses one per row, as a shift. What does not fit is saturated, products and
sums are int64, and every docstring says why they cannot wrap. Shifts are at least 0.
"""

import math
from typing import NamedTuple

import torch

# A quantised activation: 128 * high + low, two int8 and so two int8 products.
PAIR_BITS = 15
LOW_BITS = 7
# By how much the result of `attention` is finer than its values.
MIXED_POINT = 8
# `linear` takes off it what a row was shifted by, up to 31 - 14 and a rounding.
LEAST_LINEAR_SHIFT = 18
# Longest sum of products of two int8 that int32 is sure to hold.
MOST_TERMS = (1 << 17) - 1
# Point of an exponent, of a probability, and of the tables of `rotate`.
EXP_POINT = 14
ONE_POINT = 30
TABLE_POINT = 15
# exp on (-ln 2, 0] is a (x + b)^2 + c: I-BERT's coefficients; dividing by a leaves integers.
LN2 = round(math.log(2) * (1 << EXP_POINT))
EXP_B = round(1.353 * (1 << EXP_POINT))
EXP_C = round(0.344 / 0.3585 * (1 << 2 * EXP_POINT))
EXP_ONE = EXP_B**2 + EXP_C
LEAST_EXPONENT = -31 * LN2
# erf(x) is sign(x) (1 - a (min(|x|, b) - b)^2): I-BERT's coefficients, divided by a as well.
ERF_B = round(1.769 * (1 << EXP_POINT))
ERF_ONE = round((1 << 2 * EXP_POINT) / 0.2888)
INVERSE_ROOT2 = round((1 << EXP_POINT) / math.sqrt(2))
# Bits that `rms_norm` keeps of a value before it is squared.
NORM_BITS = 22
NEWTON_STEPS = 6


class Pair(NamedTuple):
    """int8 tensors of one shape: 128 * high + low, low in 0..127."""

    high: torch.Tensor
    low: torch.Tensor


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a int8 [M, K] times b int8 [K, N] -> int32 [M, N], exact; K <= 2^17 - 1 (asserted). On a GPU
    torch takes few shapes, which is what kernels/triton/integer.py is for."""
    assert a.shape[1] <= MOST_TERMS
    if a.shape[1] == 1:
        # torch 2.13 takes strides of a single column for those of a row.
        return a.int() * b.int()
    if 0 in (*a.shape, b.shape[1]):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    return torch._int_mm(a, b)


def products_are_exact() -> bool:
    """Whether this machine's int8 product is: some libraries add pairs in saturating int16."""
    lowest = torch.full((16, 64), -128, dtype=torch.int8)
    return all(
        torch.equal(int8_product(lowest, other), lowest.int() @ other.int())
        for other in (lowest.t(), ~lowest.t())
    )


def bit_length(values: torch.Tensor) -> torch.Tensor:
    """Bits of non-negative integers, int64: 0 for 0, 3 for 4..7."""
    powers = 1 << torch.arange(63, device=values.device)
    return (values.unsqueeze(-1) >= powers).sum(-1)


def round_shift(values: torch.Tensor, shift: torch.Tensor | int) -> torch.Tensor:
    """values / 2^shift, halves rounded up, int64; |values| < 2^62 and shift in 0..62."""
    return (values.long() + ((1 << shift) >> 1)) >> shift


def narrow(values: torch.Tensor, bits: int = 32) -> torch.Tensor:
    """Saturated to -(2^(bits-1) - 1)..2^(bits-1) - 1, int32."""
    most = (1 << bits - 1) - 1
    return values.clamp(-most, most).int()


def requantise(
    values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor | int
) -> torch.Tensor:
    """values * multiplier / 2^shift, int32: the dyadic change of scale. |product| < 2^62."""
    return narrow(round_shift(values.long() * multiplier, shift))


def integer_requantise(
    values: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """`requantise` by tensors [1] or [columns of values], as an op takes them."""
    return requantise(values, multiplier, shift)


def split(values: torch.Tensor) -> Pair:
    """Integers of 15 bits as a pair of int8."""
    return Pair(
        (values >> LOW_BITS).to(torch.int8), (values & ((1 << LOW_BITS) - 1)).to(torch.int8)
    )


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values int32 [..., n] as integers of 15 bits, int32, and the shift of each row, int64
    [..., 1]: value = integer * 2^shift, to within half a step (one, where a row's largest is
    rounded up to 2^14 and saturates). The shift is the least that fits."""
    length = bit_length(values.long().abs().amax(-1, keepdim=True))
    shift = (length - (PAIR_BITS - 1)).clamp(min=0)
    return narrow(round_shift(values, shift), PAIR_BITS), shift


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    shift: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x int32 [..., K] times weight int8 [N, K] -> int32 [..., N].

    Rows are quantised here; multiplier int32 [N] up to 2^24 and shift (18..62) hold the scales of
    weight, x and result; bias int32 [N] has the point of the result. K <= 2^17 - 1, so a product of
    int8 matrices fits int32, the sums are below 2^38, and what is shifted below 2^62.
    """
    rows, exponent = quantise(x.flatten(0, -2))
    high, low = split(rows)
    columns = weight.t()
    sums = int8_product(high, columns).long() << LOW_BITS
    sums = sums + int8_product(low, columns)
    made = round_shift(sums * multiplier, shift - exponent)
    made = narrow(made if bias is None else made + bias)
    return made.view(*x.shape[:-1], weight.shape[0])


def pair_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] times b [N, K], both of 15 bits -> int64 [M, N], exact. K <= 2^17 - 1."""
    left, right = split(a), split(b.t())
    mixed = int8_product(left.high, right.low).long() + int8_product(left.low, right.high)
    sums = int8_product(left.high, right.high).long() << 2 * LOW_BITS
    return sums + (mixed << LOW_BITS) + int8_product(left.low, right.low)


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^(x / 2^14) * EXP_ONE of x <= 0, int32; EXP_ONE is e^0 and below 2^30.

    i-exp: x = p - z ln 2 with p in (-ln 2, 0], then a quadratic of p and a shift by z. Within
    1.95e-3 of exp. Nothing exceeds int32: (p + b)^2 + c is at most EXP_ONE.
    """
    x = x.clamp(min=LEAST_EXPONENT)
    halvings = (-x) // LN2
    shifted = x + halvings * LN2 + EXP_B
    return ((shifted * shifted + EXP_C) >> halvings).int()


def softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Probabilities int32 at point 30 of scores int32 [..., n] at point 14, over the last
    dimension where visible (bool, same shape) holds; 0 elsewhere, and for rows that see nothing.

    A row's total is below 2^30 n, what is divided below 2^60.
    """
    hidden = torch.full_like(scores, -(1 << 31))
    greatest = torch.where(visible, scores, hidden).amax(-1, keepdim=True)
    below = (scores.long() - greatest).clamp(LEAST_EXPONENT, 0).int()
    weights = torch.where(visible, exp(below), torch.zeros_like(scores)).long()
    total = weights.sum(-1, keepdim=True).clamp(min=1)
    return ((weights << ONE_POINT) // total).int()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x) of x int32 at point 14, int64 at point 30. Divides less than 2^60."""
    small = exp((-x.long().abs()).clamp(min=LEAST_EXPONENT).int()).long()
    above = torch.where(x >= 0, torch.full_like(small, EXP_ONE), small)
    return (above << ONE_POINT) // (small + EXP_ONE)


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """(1 + erf(x / sqrt 2)) / 2 of x int32 at point 14, int64 at point 30, by I-BERT's i-erf."""
    scaled = round_shift(x.long().abs() * INVERSE_ROOT2, EXP_POINT)
    distance = scaled.clamp(max=ERF_B) - ERF_B
    erf = (ERF_ONE - distance * distance) * x.sign()
    return ((ERF_ONE + erf) << (ONE_POINT - 1)) // ERF_ONE


def silu(x: torch.Tensor, point: int) -> torch.Tensor:
    """i-SiLU: x * sigmoid(x), int32 at the point of x, which is at least 14."""
    return round_shift(x.long() * sigmoid(_exponent(x, point)), ONE_POINT).int()


def gelu(x: torch.Tensor, point: int) -> torch.Tensor:
    """i-GELU: x * normal_cdf(x), int32 at the point of x, which is at least 14. Within 0.018 of
    gelu (I-BERT)."""
    return round_shift(x.long() * normal_cdf(_exponent(x, point)), ONE_POINT).int()


ACTIVATIONS = {"silu": silu, "gelu": gelu}


def gated(gate_up: torch.Tensor, activation: str, point: int, shift: int) -> torch.Tensor:
    """gate_up int32 [..., 2n] (gate first) at `point` -> activation(gate) * up, int32 [..., n] at
    point 2 * point - shift. The product is below 2^62."""
    gate, up = gate_up.chunk(2, -1)
    return requantise(ACTIVATIONS[activation](gate, point), up.long(), shift)


def isqrt(values: torch.Tensor) -> torch.Tensor:
    """The floor of the square root of int64 values in 0..2^62, exact: i-sqrt, Newton's iteration
    from a power of two at most twice too large, whose error 6 steps bring below 1."""
    root = torch.ones_like(values) << ((bit_length(values) + 1) >> 1)
    for _ in range(NEWTON_STEPS):
        root = torch.minimum(root, (root + values // root.clamp(min=1)) >> 1)
    return root


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: int, shift: int) -> torch.Tensor:
    """x int32 [..., n] over its root mean square, times weight, int32.

    weight int32 [n]: sqrt(n) times the real one, at point w; epsilon: n times the real one at twice
    the point of x, in 1..2^60; shift = 30 + w - point of the result; n <= 2^16. Rows lose what lies
    below 22 bits. Squares sum to less than 2^61, and x times the inverse is below 2^54.
    """
    assert x.shape[-1] <= 1 << 16 and 1 <= epsilon <= 1 << 60
    excess = (bit_length(x.long().abs().amax(-1, keepdim=True)) - NORM_BITS).clamp(min=0)
    kept = round_shift(x, excess)
    total = (kept * kept).sum(-1, keepdim=True)
    # Without what the shift took, a row of large values has no use for it.
    total = (total + (torch.full_like(total, epsilon) >> 2 * excess)).clamp(min=1)
    lift = (62 - bit_length(total)) & ~1
    inverse = torch.full_like(total, 1 << 61) // isqrt(total << lift)
    unit = round_shift(kept * inverse, 31 - (lift >> 1))
    return requantise(unit, weight, shift)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shift: int) -> torch.Tensor:
    """Rotary embedding of x int32 [tokens, heads, head_dim] by tables int32 [tokens, 1,
    head_dim / 2] at point 15, in the half-split layout; integers of 15 bits, int32, at point
    (15 + point of x - shift)."""
    first, second = x.long().chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return narrow(round_shift(turned, shift), PAIR_BITS)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, multiplier: int, shift: int
) -> torch.Tensor:
    """Causal grouped-query attention of one sequence: q [T, H, D], k, v [N, KH, D], of 15 bits,
    the T queries being the last of N positions -> int32 [T, H, D] at the point of v + 8.

    multiplier (up to 2^24) and shift bring a product of q and k, softmax's scale included, to
    point 14. D < 2^10 and N < 2^17, so scores are below 2^38 and probabilities times values, of
    which a row has 2^30 in all, below 2^46.
    """
    tokens, heads, _ = q.shape
    groups = heads // k.shape[1]
    places = torch.arange(k.shape[0], device=q.device)
    visible = (places <= places[len(places) - tokens :, None]).repeat(groups, 1)
    made = []
    for queries, keys, values in zip(q.chunk(k.shape[1], 1), k.unbind(1), v.unbind(1), strict=True):
        rows = queries.transpose(0, 1).flatten(0, 1)
        scores = narrow(round_shift(pair_product(rows, keys) * multiplier, shift))
        weights, exponent = quantise(softmax(scores, visible))
        mixed = round_shift(pair_product(weights, values.t()), ONE_POINT - MIXED_POINT - exponent)
        made.append(narrow(mixed).view(groups, tokens, v.shape[-1]).transpose(0, 1))
    return torch.cat(made, 1)


def _exponent(x: torch.Tensor, point: int) -> torch.Tensor:
    return narrow(round_shift(x, point - EXP_POINT))
