"""What several kernels do with a tile: a product with or without matrix units, a softmax in steps.

Used by the attention and expert kernels of this folder. Triton has no tensor-core path before
sm_80; there a product is spelled out as multiplications and a sum, over tiles that are small.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))  # softmax runs in powers of two, which GPUs have


@triton.jit
def product(a, b, acc, MATRIX: tl.constexpr):
    """acc [M, N] float32 + a [M, K] times b [K, N], summed in float32."""
    if MATRIX:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        terms = a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :]
        acc += tl.sum(terms, axis=1)
    return acc


@triton.jit
def softmax_step(scores, seen, top, total):
    """One more tile of scores [M, N], in powers of two, where `seen` says which count.

    Returns (weights [M, N], shrink [M], top, total): what was summed with the weights so far is to
    be multiplied by shrink. top [M] is the largest score yet, -inf before the first one seen.
    """
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, axis=1)


def score_factor(width: int, scale: float | None) -> float:
    """From a product of heads to a score in powers of two; scale is width ** -0.5 if None."""
    return (width**-0.5 if scale is None else scale) * math.log2(math.e)
