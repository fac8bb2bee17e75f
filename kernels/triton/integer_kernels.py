"""Kernels of the integer-only operations, the functions of reference/integer.py bit for bit.

Launched by integer.py beside this. Every quotient here is of numbers that are not negative, since
Triton's division truncates and torch's floors. Ranges are those that the reference proves; offsets
of rows are int64.
"""

import triton
import triton.language as tl

from kernels.reference import integer

LN2 = tl.constexpr(integer.LN2)
EXP_B = tl.constexpr(integer.EXP_B)
EXP_C = tl.constexpr(integer.EXP_C)
EXP_ONE = tl.constexpr(integer.EXP_ONE)
LEAST_EXPONENT = tl.constexpr(integer.LEAST_EXPONENT)
ERF_B = tl.constexpr(integer.ERF_B)
ERF_ONE = tl.constexpr(integer.ERF_ONE)
INVERSE_ROOT2 = tl.constexpr(integer.INVERSE_ROOT2)
EXP_POINT = tl.constexpr(integer.EXP_POINT)
ONE_POINT = tl.constexpr(integer.ONE_POINT)
MIXED_POINT = tl.constexpr(integer.MIXED_POINT)
NORM_BITS = tl.constexpr(integer.NORM_BITS)
NEWTON_STEPS = tl.constexpr(integer.NEWTON_STEPS)
TOP = tl.constexpr((1 << 31) - 1)
PAIR_TOP = tl.constexpr((1 << integer.PAIR_BITS - 1) - 1)
PAIR_LENGTH = tl.constexpr(integer.PAIR_BITS - 1)


@triton.jit
def _bit_length(value):
    """Of int64 that is not negative."""
    length = value * 0
    for step in tl.static_range(6):
        bits = 32 >> step
        more = (value >> bits) > 0
        length += tl.where(more, bits, 0)
        value = tl.where(more, value >> bits, value)
    return length + value


@triton.jit
def _round_shift(value, shift):
    """Both int64."""
    one = shift * 0 + 1
    return (value + ((one << shift) >> 1)) >> shift


@triton.jit
def _narrow(value, most):
    return tl.minimum(tl.maximum(value, -most), most).to(tl.int32)


@triton.jit
def _exponent_of(largest):
    """How far a row whose largest magnitude this is is shifted to 15 bits, int64."""
    return tl.maximum(_bit_length(largest.to(tl.int64)) - PAIR_LENGTH, 0)


@triton.jit
def _dot(a, b, MATRIX: tl.constexpr):
    """int8 [M, K] times [K, N] -> int32; without matrix units spelled out, for small tiles."""
    if MATRIX:
        return tl.dot(a, b, out_dtype=tl.int32)
    terms = a.to(tl.int32)[:, :, None] * b.to(tl.int32)[None, :, :]
    return tl.sum(terms, axis=1)


@triton.jit
def _pair_dot(a, b, MATRIX: tl.constexpr):
    """a [M, K] times b [K, N], int32 of 15 bits -> int64."""
    a_high, a_low = (a >> 7).to(tl.int8), (a & 127).to(tl.int8)
    b_high, b_low = (b >> 7).to(tl.int8), (b & 127).to(tl.int8)
    mixed = _dot(a_high, b_low, MATRIX).to(tl.int64) + _dot(a_low, b_high, MATRIX)
    sums = _dot(a_high, b_high, MATRIX).to(tl.int64) << 14
    return sums + (mixed << 7) + _dot(a_low, b_low, MATRIX)


@triton.jit
def _exp(x):
    """Of int32 at point 14, not above 0."""
    x = tl.maximum(x, LEAST_EXPONENT)
    halvings = (-x) // LN2
    shifted = x + halvings * LN2 + EXP_B
    return (shifted * shifted + EXP_C) >> halvings


@triton.jit
def _activated(x, point, GELU: tl.constexpr):
    """x int32 at point (int64) -> x times sigmoid or the normal distribution's function."""
    wide = x.to(tl.int64)
    scaled = _narrow(_round_shift(wide, point - EXP_POINT), TOP).to(tl.int64)
    size = tl.abs(scaled)
    if GELU:
        distance = tl.minimum(_round_shift(size * INVERSE_ROOT2, point * 0 + EXP_POINT), ERF_B)
        distance -= ERF_B
        erf = -(distance * distance) + ERF_ONE
        erf = tl.where(scaled > 0, erf, tl.where(scaled < 0, -erf, 0))
        share = ((erf + ERF_ONE) << (ONE_POINT - 1)) // ERF_ONE
    else:
        # Cut before it is negated: of a lower bound for minus a 64-bit magnitude the assembler of
        # CUDA 12.8 makes a constant, and every share 0 or 1.
        small = _exp(-tl.minimum(size, -LEAST_EXPONENT).to(tl.int32)).to(tl.int64)
        above = tl.where(scaled >= 0, EXP_ONE, small)
        share = (above << ONE_POINT) // (small + EXP_ONE)
    return _round_shift(wide * share, point * 0 + ONE_POINT)


@triton.jit
def requantise_kernel(values, multiplier, shift, made, size, N: tl.constexpr, B: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = place < size
    value = tl.load(values + place, mask=ok, other=0).to(tl.int64)
    factor = tl.load(multiplier + place % N, mask=ok, other=0).to(tl.int64)
    by = tl.load(shift + place % N, mask=ok, other=0)
    tl.store(made + place, _narrow(_round_shift(value * factor, by), TOP), mask=ok)


@triton.jit
def quantise_kernel(values, made, exponents, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((B,), 0, tl.int64)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        value = tl.load(values + row * N + place, mask=place < N, other=0).to(tl.int64)
        largest = tl.maximum(largest, tl.abs(value))
    exponent = _exponent_of(tl.max(largest, axis=0))
    tl.store(exponents + row, exponent)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        value = tl.load(values + row * N + place, mask=place < N, other=0).to(tl.int64)
        short = _narrow(_round_shift(value, exponent), PAIR_TOP)
        tl.store(made + row * N + place, short, mask=place < N)


@triton.jit(do_not_specialize=["rows", "shift"])
def linear_kernel(
    x,
    exponents,
    weight,
    multiplier,
    bias,
    made,
    rows,
    shift,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """x int32 [rows, K] of 15 bits, weight int8 [N, K]; a program makes BM rows by BN columns."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    high = tl.zeros((BM, BN), tl.int32)
    low = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (row < rows)[:, None] & (k < K)[None, :]
        value = tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0)
        inside = (k < K)[:, None] & (column < N)[None, :]
        across = tl.load(weight + column[None, :] * K + k[:, None], mask=inside, other=0)
        high += _dot((value >> 7).to(tl.int8), across, MATRIX)
        low += _dot((value & 127).to(tl.int8), across, MATRIX)
    sums = (high.to(tl.int64) << 7) + low
    factor = tl.load(multiplier + column, mask=column < N, other=0).to(tl.int64)
    exponent = tl.load(exponents + row, mask=row < rows, other=0)
    result = _round_shift(sums * factor[None, :], shift.to(tl.int64) - exponent[:, None])
    if bias is not None:
        result += tl.load(bias + column, mask=column < N, other=0).to(tl.int64)[None, :]
    inside = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(made + row[:, None] * N + column[None, :], _narrow(result, TOP), mask=inside)


@triton.jit
def softmax_kernel(scores, visible, made, N: tl.constexpr, B: tl.constexpr):
    """One row a program, three times over it: its largest, its total, the quotients."""
    row = tl.program_id(0).to(tl.int64)
    greatest = tl.full((B,), -(1 << 31), tl.int64)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        seen = tl.load(visible + row * N + place, mask=place < N, other=0) != 0
        score = tl.load(scores + row * N + place, mask=place < N, other=0).to(tl.int64)
        greatest = tl.maximum(greatest, tl.where(seen, score, -(1 << 31)))
    most = tl.max(greatest, axis=0)
    total = tl.full((B,), 0, tl.int64)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        seen = tl.load(visible + row * N + place, mask=place < N, other=0) != 0
        total += _weights(tl.load(scores + row * N + place, mask=place < N, other=0), most, seen)
    whole = tl.maximum(tl.sum(total, axis=0), 1)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        seen = tl.load(visible + row * N + place, mask=place < N, other=0) != 0
        weight = _weights(tl.load(scores + row * N + place, mask=place < N, other=0), most, seen)
        share = ((weight << ONE_POINT) // whole).to(tl.int32)
        tl.store(made + row * N + place, share, mask=place < N)


@triton.jit
def _weights(scores, most, seen):
    """i-exp of scores below the greatest where seen, else 0, int64."""
    below = tl.minimum(tl.maximum(scores.to(tl.int64) - most, LEAST_EXPONENT), 0)
    return tl.where(seen, _exp(below.to(tl.int32)), 0).to(tl.int64)


@triton.jit(do_not_specialize=["size", "point", "shift"])
def gated_kernel(
    gate, up, made, size, point, shift, N: tl.constexpr, GELU: tl.constexpr, B: tl.constexpr
):
    """Without up: the activation alone. Rows of gate and up are N or, in one tensor, 2 N long."""
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok, wide = place < size, point.to(tl.int64)
    at = place if up is None else place // N * (2 * N) + place % N
    result = _activated(tl.load(gate + at, mask=ok, other=0), wide, GELU)
    if up is not None:
        other = tl.load(up + at, mask=ok, other=0).to(tl.int64)
        result = _round_shift(result * other, shift.to(tl.int64))
    tl.store(made + place, _narrow(result, TOP), mask=ok)


@triton.jit(do_not_specialize=["epsilon", "shift"])
def rms_norm_kernel(x, weight, made, epsilon, shift, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((B,), 0, tl.int64)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        value = tl.load(x + row * N + place, mask=place < N, other=0).to(tl.int64)
        largest = tl.maximum(largest, tl.abs(value))
    excess = tl.maximum(_bit_length(tl.max(largest, axis=0)) - NORM_BITS, 0)
    squares = tl.full((B,), 0, tl.int64)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        value = tl.load(x + row * N + place, mask=place < N, other=0).to(tl.int64)
        kept = _round_shift(value, excess)
        squares += kept * kept
    total = tl.maximum(tl.sum(squares, axis=0) + (epsilon.to(tl.int64) >> (2 * excess)), 1)
    lift = ((62 - _bit_length(total)) >> 1) << 1
    inverse = tl.full((), 1 << 61, tl.int64) // _isqrt(total << lift)
    back = 31 - (lift >> 1)
    for start in range(0, N, B):
        place = start + tl.arange(0, B)
        value = tl.load(x + row * N + place, mask=place < N, other=0).to(tl.int64)
        unit = _round_shift(_round_shift(value, excess) * inverse, back)
        factor = tl.load(weight + place, mask=place < N, other=0).to(tl.int64)
        result = _narrow(_round_shift(unit * factor, shift.to(tl.int64)), TOP)
        tl.store(made + row * N + place, result, mask=place < N)


@triton.jit
def _isqrt(value):
    """Of int64 in 1..2^62."""
    one = value * 0 + 1
    root = one << ((_bit_length(value) + 1) >> 1)
    for _ in tl.static_range(NEWTON_STEPS):
        root = tl.minimum(root, (root + value // root) >> 1)
    return root


@triton.jit(do_not_specialize=["heads", "shift"])
def rotate_kernel(x, cos, sin, made, heads, shift, HALF: tl.constexpr, B: tl.constexpr):
    """One head of one token a program; tables have a row of HALF for each token."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, B)
    ok, token, by = place < HALF, row // heads, shift.to(tl.int64)
    first = tl.load(x + row * 2 * HALF + place, mask=ok, other=0).to(tl.int64)
    second = tl.load(x + row * 2 * HALF + HALF + place, mask=ok, other=0).to(tl.int64)
    c = tl.load(cos + token * HALF + place, mask=ok, other=0).to(tl.int64)
    s = tl.load(sin + token * HALF + place, mask=ok, other=0).to(tl.int64)
    turned = _narrow(_round_shift(first * c - second * s, by), PAIR_TOP)
    tl.store(made + row * 2 * HALF + place, turned, mask=ok)
    turned = _narrow(_round_shift(second * c + first * s, by), PAIR_TOP)
    tl.store(made + row * 2 * HALF + HALF + place, turned, mask=ok)


@triton.jit
def _scores(query, keys, at, k, seen, multiplier, shift, MATRIX: tl.constexpr):
    """Scores int64 of a block of rows with a block of keys, at point 14."""
    key = tl.load(keys + at, mask=k[:, None] & (seen[None, :]), other=0).to(tl.int32)
    return _narrow(_round_shift(_pair_dot(query, key, MATRIX) * multiplier, shift), TOP)


@triton.jit(do_not_specialize=["tokens", "places", "multiplier", "shift"])
def attention_kernel(
    q,
    k,
    v,
    made,
    tokens,
    places,
    multiplier,
    shift,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """BM queries of one head a program, three times over the keys: largest, total, mixture."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dim = tl.arange(0, BD)
    here = (row < tokens)[:, None] & (dim < D)[None, :]
    at = (row[:, None] * H + head) * D + dim[None, :]
    query = tl.load(q + at, mask=here, other=0).to(tl.int32)
    last = places - tokens + row
    keys, values = k + head // (H // KH) * D, v + head // (H // KH) * D
    factor, by = multiplier.to(tl.int64), shift.to(tl.int64)
    most = tl.full((BM,), -(1 << 31), tl.int64)
    for start in range(0, places, BN):
        place = start + tl.arange(0, BN).to(tl.int64)
        across = place[None, :] * (KH * D) + dim[:, None]
        score = _scores(query, keys, across, dim < D, place < places, factor, by, MATRIX).to(
            tl.int64
        )
        score = tl.where(place[None, :] <= last[:, None], score, -(1 << 31))
        most = tl.maximum(most, tl.max(score, axis=1))
    total = tl.full((BM,), 0, tl.int64)
    for start in range(0, places, BN):
        place = start + tl.arange(0, BN).to(tl.int64)
        across = place[None, :] * (KH * D) + dim[:, None]
        score = _scores(query, keys, across, dim < D, place < places, factor, by, MATRIX)
        seen = (place[None, :] <= last[:, None]) & (place < places)[None, :]
        total += tl.sum(_weights(score, most[:, None], seen), axis=1)
    whole = tl.maximum(total, 1)
    # The greatest probability of a row is that of its greatest score.
    exponent = _exponent_of((whole * 0 + EXP_ONE << ONE_POINT) // whole)
    mixed = tl.zeros((BM, BD), tl.int64)
    for start in range(0, places, BN):
        place = start + tl.arange(0, BN).to(tl.int64)
        across = place[None, :] * (KH * D) + dim[:, None]
        score = _scores(query, keys, across, dim < D, place < places, factor, by, MATRIX)
        seen = (place[None, :] <= last[:, None]) & (place < places)[None, :]
        weight = (_weights(score, most[:, None], seen) << ONE_POINT) // whole[:, None]
        short = _narrow(_round_shift(weight, exponent[:, None]), PAIR_TOP)
        down = place[:, None] * (KH * D) + dim[None, :]
        inside = (place < places)[:, None] & (dim < D)[None, :]
        value = tl.load(values + down, mask=inside, other=0).to(tl.int32)
        mixed += _pair_dot(short, value, MATRIX)
    result = _round_shift(mixed, -exponent[:, None] + (ONE_POINT - MIXED_POINT))
    tl.store(made + at, _narrow(result, TOP), mask=here)
