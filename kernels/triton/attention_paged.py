"""The kernel of `paged_attention`: one new token per sequence over its pages, in parts if asked.

A program holds the query heads that share one key head, for one part of one sequence. A head is
kept as two halves, which for a packed cache are the low and the high nibbles, so that all forms
take one way. Semantics: reference/attention_paged.py. Called by kernels/ops/attention_paged.py on
a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.kv_cache import cache_bits, meta_cache
from kernels.triton.launch import target_of
from kernels.triton.merge import merge_plan, merge_states
from kernels.triton.plan import (
    TYPES,
    Plan,
    flat_slots,
    head_size,
    operands,
    packed,
    power,
    precision,
    run,
    shipped,
)
from kernels.triton.targets import Target
from kernels.triton.tile import LOG2_E, product, score_factor, softmax_step

__all__ = ["cases", "merge_states", "paged_attention", "paged_attention_parts"]

# The forms of cache, dtypes and head sizes that are compiled ahead of time.
SHIPPED = (
    ("float", torch.float16, 64),
    ("float", torch.bfloat16, 128),
    ("float", torch.bfloat16, 256),
    ("float", torch.float32, 128),
    ("int8", torch.bfloat16, 64),
    ("int8", torch.float16, 128),
    ("int8", torch.bfloat16, 256),
    ("int8", torch.float32, 128),
    ("int4", torch.float16, 64),
    ("int4", torch.bfloat16, 128),
    ("int4", torch.bfloat16, 256),
    ("int4", torch.float32, 128),
)


@triton.jit
def _columns(PACKED: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """(first, second) int32 [C]: which of a head's D numbers the halves hold; D or more: none."""
    column = tl.arange(0, C)
    half: tl.constexpr = (D + 1) // 2
    if PACKED:
        first = tl.where(column < half, column // 16 * 32 + column % 16, D)
        return first, first + 16
    return tl.where(column < half, column, D), column + half


@triton.jit
def _query(q, at, ours, first, second, D: tl.constexpr):
    """Both halves [GP, C] of the query heads at q + at."""
    ours = ours[:, None]
    low = tl.load(q + at[:, None] + first[None, :], mask=ours & (first < D)[None, :], other=0.0)
    high = tl.load(q + at[:, None] + second[None, :], mask=ours & (second < D)[None, :], other=0.0)
    return low, high


@triton.jit
def _halves(
    cache, scales, at, scale_at, seen, first, second,
    D: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Both halves [BN, C] of the tokens at cache + at: as they are stored, BITS bits as float32."""
    kept: tl.constexpr = cache.dtype.element_ty
    if kept == tl.uint8:
        byte = tl.arange(0, C)[None, :]
        ok = seen[:, None] & (byte < D // 2)
        zero: tl.constexpr = 2 ** (BITS - 1)
        levels = tl.load(cache + at[:, None] + byte, mask=ok, other=0).to(tl.int32)
        low, high = levels & 15, levels >> 4
        if BITS == 5:
            # Two of a group's four bytes for its first 16 numbers, two for the others.
            fifths = cache + at[:, None] + D // 2 + byte // 16 * 4 + byte % 16 // 8
            low |= (tl.load(fifths, mask=ok, other=0).to(tl.int32) >> byte % 8 & 1) << 4
            high |= (tl.load(fifths + 2, mask=ok, other=0).to(tl.int32) >> byte % 8 & 1) << 4
        scale = tl.load(scales + scale_at[:, None] + byte // 16, mask=ok, other=0.0).to(tl.float32)
        low = (low - zero).to(tl.float32) * scale
        high = (high - zero).to(tl.float32) * scale
    else:
        at = at[:, None]
        low = tl.load(cache + at + first, mask=seen[:, None] & (first < D)[None, :], other=0)
        high = tl.load(cache + at + second, mask=seen[:, None] & (second < D)[None, :], other=0)
    return low, high


@triton.jit
def _weighed(weights, low, high, scales, scale_at, seen, dtype: tl.constexpr):
    """(weights [GP, BN], low, high [BN, C]) of dtype, the scales of int8 values multiplied in.

    bfloat16 holds an int8 exactly, and any scale as a weight; float16 would lose a small one.
    """
    if low.dtype == tl.int8:
        scale = tl.load(scales + scale_at, mask=seen, other=0.0)
        if dtype == tl.bfloat16:
            weights *= scale[None, :]
        else:
            low = low.to(tl.float32) * scale[:, None]
            high = high.to(tl.float32) * scale[:, None]
    return weights.to(dtype), low.to(dtype), high.to(dtype)


@triton.jit
def _span(context, window, part, splits, BN: tl.constexpr):
    """(start, stop): the tokens of one part, in whole tiles but for the last."""
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    size = tl.cdiv(tl.cdiv(context - first, BN), splits) * BN
    start = first + part * size
    return start, tl.minimum(start + size, context)


@triton.jit(do_not_specialize=["window", "splits"])
def paged_attention_kernel(
    q, keys, values, key_scales, value_scales, page_tables, context_tokens, outs, lse,
    factor, window, splits, table_stride, q_stride_s, q_stride_h,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    key_scale_stride_t, key_scale_stride_h, value_scale_stride_t, value_scale_stride_h,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, MATRIX: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Sequence, key head and part are the program ids; factor turns a product into a score in
    powers of two. outs [splits, S, H, D] and lse [splits, S, H] are contiguous; strides are of
    s (sequence), t (slot) and h."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    first, second = _columns(PACKED, D, C)
    group = tl.arange(0, GP)
    row = sequence * q_stride_s + (head * G + group) * q_stride_h
    q_low, q_high = _query(q, row, group < G, first, second, D)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    out_low, out_high = tl.zeros((GP, C), tl.float32), tl.zeros((GP, C), tl.float32)
    start, stop = _span(tl.load(context_tokens + sequence), window, part, splits, BN)
    for place in range(start, stop, BN):
        token = place + tl.arange(0, BN)
        seen = token < stop
        page = tl.load(page_tables + sequence * table_stride + token // PAGE, mask=seen, other=0)
        slot = page.to(tl.int64) * PAGE + token % PAGE
        at = slot * key_stride_t + head * key_stride_h
        scale_at = slot * key_scale_stride_t + head * key_scale_stride_h
        low, high = _halves(keys, key_scales, at, scale_at, seen, first, second, D, C, KEY_BITS)
        scores = tl.zeros((GP, BN), tl.float32)
        scores = product(q_low, tl.trans(low.to(q_low.dtype)), scores, MATRIX)
        scores = product(q_high, tl.trans(high.to(q_low.dtype)), scores, MATRIX)
        if keys.dtype.element_ty == tl.int8:
            # Taken as whole numbers until here, which every dtype holds exactly.
            scores *= tl.load(key_scales + scale_at, mask=seen, other=0.0)[None, :]
        weights, shrink, top, total = softmax_step(scores * factor, seen[None, :], top, total)
        at = slot * value_stride_t + head * value_stride_h
        scale_at = slot * value_scale_stride_t + head * value_scale_stride_h
        low, high = _halves(
            values, value_scales, at, scale_at, seen, first, second, D, C, VALUE_BITS
        )
        weights, low, high = _weighed(weights, low, high, value_scales, scale_at, seen, q_low.dtype)
        out_low = product(weights, low, out_low * shrink[:, None], MATRIX)
        out_high = product(weights, high, out_high * shrink[:, None], MATRIX)
    row = (
        (part.to(tl.int64) * tl.num_programs(0) + sequence) * tl.num_programs(1) + head
    ) * G + group
    _finish(outs, lse, row, group < G, top, total, out_low, out_high, first, second, D)


@triton.jit
def _finish(outs, lse, row, ours, top, total, low, high, first, second, D: tl.constexpr):
    """Stores a part: sums divided by the total of their weights, zeros and -inf if it is empty."""
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(lse + row, (top + tl.log2(divisor)) / LOG2_E, mask=ours)
    kept = outs.dtype.element_ty
    at = outs + row[:, None] * D
    low = (low / divisor[:, None]).to(kept)
    high = (high / divisor[:, None]).to(kept)
    tl.store(at + first[None, :], low, mask=ours[:, None] & (first < D)[None, :])
    tl.store(at + second[None, :], high, mask=ours[:, None] & (second < D)[None, :])


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    page_tables: torch.Tensor,
    context_tokens: torch.Tensor,
    window: int = 0,
    splits: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    """See reference/attention_paged.py. ValueError for float64, for heads above 256, and for a
    cache with gaps between slots or inside heads."""
    target = target_of("paged_attention", q)
    caches = (keys, values, key_scales, value_scales, page_tables, context_tokens)
    # One part is the result itself; several are kept in float32 until they are merged.
    dtype = q.dtype if splits == 1 else torch.float32
    outs, lse = _parts(q, splits, dtype)
    run(_plan(target, q, *caches, outs, lse, window, scale))
    if splits == 1:
        return outs[0]
    out = torch.empty_like(outs[0], dtype=q.dtype)
    run(merge_plan(target, outs, lse, out, torch.empty_like(lse[0])))
    return out


def paged_attention_parts(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    page_tables: torch.Tensor,
    context_tokens: torch.Tensor,
    window: int = 0,
    splits: int = 1,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/attention_paged.py. Parts are cut at whole tiles of tokens."""
    target = target_of("paged_attention_parts", q)
    caches = (keys, values, key_scales, value_scales, page_tables, context_tokens)
    outs, lse = _parts(q, splits, torch.float32)
    run(_plan(target, q, *caches, outs, lse, window, scale))
    return outs, lse


def _parts(q: torch.Tensor, splits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    outs = torch.empty(splits, *q.shape, dtype=dtype, device=q.device)
    return outs, torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=q.device)


def _plan(
    target: Target,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    page_tables: torch.Tensor,
    context_tokens: torch.Tensor,
    outs: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float | None,
) -> Plan:
    op = "paged_attention"
    sequences, heads, width = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    config = choose(f"{op}/{precision(op, q.dtype)}-{head_size(op, width)}", target, sequences)
    q, page_tables = packed(q), packed(page_tables)
    args: dict[str, Any] = {
        "q": q,
        "page_tables": page_tables,
        "context_tokens": context_tokens.contiguous(),
        "outs": outs,
        "lse": lse,
        "factor": score_factor(width, scale),
        "window": window,
        "splits": outs.shape[0],
        "table_stride": page_tables.stride(0),
        "q_stride_s": q.stride(0),
        "q_stride_h": q.stride(1),
        **_side("key", keys, key_scales),
        **_side("value", values, value_scales),
        "G": group,
        # Matrix units want 16 rows at least.
        "GP": max(power(group), 16 if config.constants["MATRIX"] else 1),
        "D": width,
        "C": max(power((width + 1) // 2), 16),
        "PAGE": keys.shape[1],
        "KEY_BITS": cache_bits(keys, key_scales),
        "VALUE_BITS": cache_bits(values, value_scales),
        **config.constants,
    }
    return Plan(paged_attention_kernel, (sequences, kv_heads, outs.shape[0]), args, config)


def _side(name: str, cache: torch.Tensor, scales: torch.Tensor | None) -> dict[str, Any]:
    """The arguments for the keys, or those for the values."""
    flat = flat_slots("paged_attention", f"{name}s", cache, 1)
    args: dict[str, Any] = {f"{name}s": flat, f"{name}_scales": None}
    steps = (0, 0)
    if scales is not None:
        inner = flat_slots("paged_attention", f"{name}_scales", scales, scales.dim() - 3)
        args[f"{name}_scales"], steps = inner, (inner.stride(0), inner.stride(1))
    args |= {f"{name}_stride_t": flat.stride(0), f"{name}_stride_h": flat.stride(1)}
    return args | {f"{name}_scale_stride_t": steps[0], f"{name}_scale_stride_h": steps[1]}


def cases(target: Target) -> list[Case | Refused]:
    """16 sequences of 2048 tokens in pages of 16, 32 heads over 8, 4 parts."""
    made: list[Case | Refused] = []
    for kind, dtype, width in SHIPPED:
        keys, key_scales = meta_cache(kind, dtype, 2048, 16, 8, width, bits=5)
        values, value_scales = meta_cache(kind, dtype, 2048, 16, 8, width)
        q = torch.empty(16, 32, width, dtype=dtype, device="meta")
        tables = torch.empty(16, 128, dtype=torch.int32, device="meta")
        outs, lse = _parts(q, 4, torch.float32)
        caches = (keys, values, key_scales, value_scales, tables, tables[:, 0].contiguous())
        plan = _plan(target, q, *caches, outs, lse, 0, None)
        matrix = operands(plan.config, dtype)
        name = f"paged_attention/{TYPES[dtype]}-{kind}-{width}"
        made.append(shipped(name, plan, 4 * 16 * 32 * 2048 * width, matrix))
    merged = torch.empty(16, 32, 128, dtype=torch.bfloat16, device="meta")
    outs, lse = _parts(merged, 4, torch.float32)
    plan = merge_plan(target, outs, lse, merged, lse[0])
    return [*made, shipped("merge_states/bf16-128", plan, 3 * outs.numel())]
