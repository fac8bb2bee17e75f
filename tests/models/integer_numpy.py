"""The integer decoder layer once more, from its formulas, in NumPy's int64 and Python's integers.

Shares no code with kernels/reference/integer.py: quotients are floor divisions where that shifts,
activations are not split into int8 pairs, roots are math.isqrt's, attention goes query by query,
and constants are written out. Takes the tensors of a `models.integer.Layer` as arrays.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.int64]]

LN2 = 11357  # ln 2 at point 14
EXP_B, EXP_C = 22168, 257578234  # 1.353 at point 14; 0.344 / 0.3585 at point 28
EXP_ONE = EXP_B * EXP_B + EXP_C


def array(tensor: Any) -> Array:
    return np.asarray(tensor.numpy(), dtype=np.int64)


def rounded(values: Array, shift: Any) -> Array:
    """values / 2^shift to the nearest integer, halves up."""
    step = np.left_shift(np.int64(1), np.asarray(shift, dtype=np.int64))
    return (values // step) + (2 * (values % step) >= step) * (step > 1)


def saturated(values: Array, bits: int) -> Array:
    return np.clip(values, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)


def fifteen_bits(rows: Array) -> tuple[Array, Array]:
    """rows [M, K] in 15 bits with sign, and by how many bits each row was shifted, [M, 1]."""
    longest = [max(int(abs(value)) for value in row).bit_length() for row in rows]
    shifts = np.array([[max(0, bits - 14)] for bits in longest], dtype=np.int64)
    return saturated(rounded(rows, shifts), 15), shifts


def linear(rows: Array, matrix: Any) -> Array:
    """rows [M, K] times a models.integer.Matrix -> [M, N]."""
    short, shifts = fifteen_bits(rows)
    sums = short @ array(matrix.weight).T
    made = rounded(sums * array(matrix.multiplier), matrix.shift - shifts)
    return saturated(made if matrix.bias is None else made + array(matrix.bias), 32)


def rms_norm(rows: Array, weight: Array, epsilon: int, shift: int) -> Array:
    made = []
    for row in rows:
        excess = max(0, max(int(abs(value)) for value in row).bit_length() - 22)
        kept = rounded(row, excess)
        total = max(1, sum(int(value) ** 2 for value in kept) + (epsilon >> 2 * excess))
        lift = (62 - total.bit_length()) // 2 * 2
        inverse = 2**61 // math.isqrt(total * 2**lift)
        unit = rounded(kept * inverse, 31 - lift // 2)
        made.append(saturated(rounded(unit * weight, shift), 32))
    return np.array(made)


def exp(x: Array) -> Array:
    x = np.maximum(x, -31 * LN2)
    halvings = -x // LN2
    p = x + halvings * LN2
    return ((p + EXP_B) ** 2 + EXP_C) // 2**halvings


def silu(x: Array, point: int) -> Array:
    exponent = saturated(rounded(x, point - 14), 32)
    small = exp(-abs(exponent))
    above = np.where(exponent < 0, small, EXP_ONE)
    sigmoid = np.floor_divide(above * 2**30, EXP_ONE + small, dtype=np.int64)
    return rounded(x * sigmoid, 30)


def rotated(x: Array, cos: Array, sin: Array, shift: int) -> Array:
    """x [T, heads, D]; cos, sin [T, D / 2]."""
    half = x.shape[-1] // 2
    made = np.empty_like(x)
    for place in range(half):
        c, s = cos[:, None, place], sin[:, None, place]
        made[..., place] = x[..., place] * c - x[..., place + half] * s
        made[..., place + half] = x[..., place + half] * c + x[..., place] * s
    return saturated(rounded(made, shift), 15)


def attention(q: Array, k: Array, v: Array, multiplier: int, shift: int) -> Array:
    """q [T, H, D]; k, v [T, KH, D]; every query sees the keys up to its own."""
    made = np.empty_like(q)
    for token in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            dots = k[: token + 1, group] @ q[token, head]
            scores = saturated(rounded(dots * multiplier, shift), 32)
            weights = exp(scores - scores.max())
            probabilities = weights * 2**30 // weights.sum()
            short, shifts = fifteen_bits(probabilities[None])
            mixed = short[0] @ v[: token + 1, group]
            made[token, head] = saturated(rounded(mixed, 30 - 8 - shifts[0, 0]), 32)
    return made


def layer(x: Array, made: Any, cos: Array, sin: Array) -> Array:
    """One sequence x [T, hidden] through a models.integer.Layer; cos, sin [T, head_dim / 2]."""
    shifts, norms = made.shifts, (made.mixer_norm, made.feedforward_norm)
    before, after = ((array(norm.weight), norm.epsilon, norm.shift) for norm in norms)
    heads = linear(rms_norm(x, *before), made.qkv).reshape(len(x), -1, 2 * cos.shape[1])
    q = rotated(heads[:, : made.heads], cos, sin, shifts.query)
    k = rotated(heads[:, made.heads : -made.kv_heads], cos, sin, shifts.key)
    v = saturated(rounded(heads[:, -made.kv_heads :], shifts.value), 15)
    mixed = attention(q, k, v, shifts.score_multiplier, shifts.score)
    x = saturated(x + linear(mixed.reshape(len(x), -1), made.out), 32)
    gate_up = linear(rms_norm(x, *after), made.gate_up)
    gate, up = np.split(gate_up, 2, axis=1)
    product = saturated(rounded(silu(gate, shifts.gate_point) * up, shifts.gated), 32)
    return saturated(x + linear(product, made.down), 32)
