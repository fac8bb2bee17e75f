"""The kernel of `paged_attention`: one new token per sequence over its pages, in parts if asked.

A program holds the query heads that share one key head, for one part of one sequence. The numbers
of a head keep the order of the cache: where it is packed that is not theirs, and queries are read
and results stored accordingly. Semantics: reference/attention_paged.py. Called by
kernels/ops/attention_paged.py on a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.cache_tile import WHOLE, cached_tile, columns
from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose, known
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
def _weighed(weights, found, scales, scale_at, seen, dtype: tl.constexpr):
    """(weights [GP, BN], found [BN, DP]) of dtype, the scales of int8 values multiplied in.

    bfloat16 holds an int8 exactly, and any scale as a weight; float16 would lose a small one.
    """
    if found.dtype == tl.int8:
        scale = tl.load(scales + scale_at, mask=seen, other=0.0)
        if dtype == tl.bfloat16:
            weights *= scale[None, :]
        else:
            found = found.to(tl.float32) * scale[:, None]
    return weights.to(dtype), found.to(dtype)


@triton.jit
def _span(context, window, part, splits, BN: tl.constexpr):
    """(start, stop): the tokens of one part, in whole tiles but for the last."""
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    size = tl.cdiv(tl.cdiv(context - first, BN), splits).to(tl.int64) * BN
    start = first + part * size
    return start.to(tl.int32), tl.minimum(start + size, context).to(tl.int32)


@triton.jit
def _pages(page_table, place, stop, PAGE: tl.constexpr, BN: tl.constexpr):
    """[BN]: the pages of the tokens from `place` on."""
    token = place + tl.arange(0, BN)
    return tl.load(page_table + token // PAGE, mask=token < stop, other=0)


@triton.jit(do_not_specialize=["window", "splits"])
def paged_attention_kernel(
    q, keys, values, key_words, value_words, key_scales, value_scales, page_tables,
    context_tokens, outs, lse, factor, window, splits, table_stride, q_stride_s, q_stride_h,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    key_scale_stride_t, key_scale_stride_h, value_scale_stride_t, value_scale_stride_h,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, MATRIX: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """Sequence, key head and part are the program ids; factor turns a product into a score in
    powers of two. outs [splits, S, H, D] and lse [splits, S, H] are contiguous; strides are of
    s (sequence), t (slot) and h."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    column = columns(PACKED, DP)[None, :]
    group = tl.arange(0, GP)
    row = sequence * q_stride_s + (head * G + group) * q_stride_h
    ours = (group < G)[:, None] & (column < D)
    query = tl.load(q + row[:, None] + column, mask=ours, other=0.0)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    start, stop = _span(tl.load(context_tokens + sequence), window, part, splits, BN)
    whole = WHOLE | (splits >> 31)
    page_tables += sequence * table_stride
    page = _pages(page_tables, start, stop, PAGE, BN)
    for place in range(start, stop, BN):
        token = place + tl.arange(0, BN)
        seen = token < stop
        slot = page.to(tl.int64) * PAGE + token % PAGE
        # The next ones: that numbers of pages are read first should delay nobody.
        page = _pages(page_tables, place + BN, stop, PAGE, BN)
        at = slot * key_stride_t + head * key_stride_h
        scale_at = slot * key_scale_stride_t + head * key_scale_stride_h
        found = cached_tile(
            keys, key_words, key_scales, at, scale_at, seen, whole, D, DP, BN, KEY_BITS
        )
        scores = tl.zeros((GP, BN), tl.float32)
        scores = product(query, tl.trans(found.to(query.dtype)), scores, MATRIX)
        if keys.dtype.element_ty == tl.int8:
            # Taken as whole numbers until here, which every dtype holds exactly.
            scores *= tl.load(key_scales + scale_at, mask=seen, other=0.0)[None, :]
        weights, shrink, top, total = softmax_step(scores * factor, seen[None, :], top, total)
        at = slot * value_stride_t + head * value_stride_h
        scale_at = slot * value_scale_stride_t + head * value_scale_stride_h
        found = cached_tile(
            values, value_words, value_scales, at, scale_at, seen, whole, D, DP, BN, VALUE_BITS
        )
        weights, found = _weighed(weights, found, value_scales, scale_at, seen, query.dtype)
        acc = product(weights, found, acc * shrink[:, None], MATRIX)
    row = (
        (part.to(tl.int64) * tl.num_programs(0) + sequence) * tl.num_programs(1) + head
    ) * G + group
    divisor = tl.where(total > 0, total, 1.0)
    # An empty part is zeros and -inf.
    tl.store(lse + row, (top + tl.log2(divisor)) / LOG2_E, mask=group < G)
    made = (acc / divisor[:, None]).to(outs.dtype.element_ty)
    tl.store(outs + row[:, None] * D + column, made, mask=ours)


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
    sequences, heads, width = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    config = _config(target, q, keys)
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
        "DP": max(power(width), 32),
        "PAGE": keys.shape[1],
        "KEY_BITS": cache_bits(keys, key_scales),
        "VALUE_BITS": cache_bits(values, value_scales),
        **config.constants,
    }
    return Plan(paged_attention_kernel, (sequences, kv_heads, outs.shape[0]), args, config)


def _config(target: Target, q: torch.Tensor, keys: torch.Tensor) -> Config:
    """The entry of the cache's kind where a target has one, else that of all kinds."""
    op = "paged_attention"
    key = f"{op}/{precision(op, q.dtype)}-{head_size(op, q.shape[2])}"
    kind = {torch.int8: "int8", torch.uint8: "int4"}.get(keys.dtype, "float")
    return choose(f"{key}-{kind}" if known(f"{key}-{kind}", target) else key, target, q.shape[0])


def _side(name: str, cache: torch.Tensor, scales: torch.Tensor | None) -> dict[str, Any]:
    """The arguments for the keys, or those for the values."""
    flat = flat_slots("paged_attention", f"{name}s", cache, 1)
    args: dict[str, Any] = {f"{name}s": flat, f"{name}_scales": None, f"{name}_words": None}
    steps = (0, 0)
    if scales is not None:
        inner = flat_slots("paged_attention", f"{name}_scales", scales, scales.dim() - 3)
        if cache.dtype == torch.uint8:
            args[f"{name}_words"] = _words(f"{name}s", flat)
        if cache.dtype == torch.uint8 and _even(inner):
            inner = inner.view(torch.int32)
        args[f"{name}_scales"], steps = inner, (inner.stride(0), inner.stride(1))
    args |= {f"{name}_stride_t": flat.stride(0), f"{name}_stride_h": flat.stride(1)}
    return args | {f"{name}_scale_stride_t": steps[0], f"{name}_scale_stride_h": steps[1]}


def _words(name: str, flat: torch.Tensor) -> torch.Tensor:
    """Packed numbers [slots, KH, n] in words of four bytes; ValueError where one is not aligned."""
    if any(size % 4 for size in (flat.shape[-1], flat.storage_offset(), *flat.stride()[:-1])):
        raise ValueError(f"paged_attention: packed {name} must begin at whole words of four bytes.")
    return flat.view(torch.int32)


def _even(scales: torch.Tensor) -> bool:
    """Whether float16 scales [slots, KH, groups] may be read in pairs."""
    sizes = (scales.shape[-1], scales.storage_offset(), *scales.stride()[:-1])
    return all(size % 2 == 0 for size in sizes)


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
