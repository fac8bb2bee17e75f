"""The kernel of `prefill_attention`: sequences over themselves, side by side without padding.

A program holds BM queries of one head and walks over the keys they see (FlashAttention, Dao et
al., 2022); in the middle are tiles that all of them see, where nothing is asked key by key.
Semantics: reference/attention_prefill.py. Called by kernels/ops/attention_prefill.py
on a CUDA or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import target_of
from kernels.triton.plan import (
    TYPES,
    Plan,
    head_size,
    operands,
    packed,
    power,
    precision,
    run,
    shipped,
)
from kernels.triton.targets import Target
from kernels.triton.tile import product, score_factor


@triton.jit
def _sequence(starts, sequences, program, BM: tl.constexpr):
    """The sequence a program belongs to: the last that begins at or before it.

    Sequence s is given programs starts[s] // BM + s onwards, never fewer than it needs: so the
    grid depends on shapes only, and nobody waits for the device to say how long sequences are.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts + middle) // BM + middle
        if begins <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["sequences", "window", "sink_tokens"])
def prefill_attention_kernel(
    q, k, v, starts, key_starts, out, factor, sequences, window, sink_tokens,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """Block of queries and head are the program ids; factor turns a product into a score in
    powers of two. key_starts: None where they are `starts`. out [T, H, D] is contiguous. WINDOW:
    there is one, of `window` tokens."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = _sequence(starts, sequences, program, BM)
    start = tl.load(starts + sequence)
    tokens = tl.load(starts + sequence + 1) - start
    row = (program - start // BM - sequence) * BM
    if (row < 0) | (row >= tokens):
        return
    query = row + tl.arange(0, BM)
    column = tl.arange(0, DP)[None, :]
    at = (start + query).to(tl.int64)[:, None]
    ours = (query < tokens)[:, None] & (column < D)
    block = tl.load(q + at * q_stride_t + head * q_stride_h + column, mask=ours, other=0.0)
    # Scores of a factor above zero have their largest where products have theirs.
    block = (block.to(tl.float32) * tl.where(factor < 0, -1.0, 1.0)).to(block.dtype)
    factor = tl.maximum(tl.abs(factor), 1e-30)
    key_start, keys_seen = start, tokens
    if key_starts is not None:
        key_start = tl.load(key_starts + sequence)
        keys_seen = tl.load(key_starts + sequence + 1) - key_start
    k += head // G * k_stride_h + key_start.to(tl.int64) * k_stride_t
    v += head // G * v_stride_h + key_start.to(tl.int64) * v_stride_t
    row += keys_seen - tokens  # behind the keys of earlier positions than the first query's
    position = (keys_seen - tokens + query)[:, None]
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    sinks, first, stop = _key_blocks(row, keys_seen, window, sink_tokens, CAUSAL, WINDOW, BM, BN)
    clear, cut = _clear_blocks(row, keys_seen, window, first, stop, CAUSAL, WINDOW, BM, BN)
    if WINDOW:
        for step in range(sinks + clear - first):
            key = tl.where(step < sinks, step, step - sinks + first) * BN + tl.arange(0, BN)
            seen = _seen(position, key[None, :], keys_seen, window, sink_tokens, CAUSAL, WINDOW)
            top, total, acc = _tile(
                block, k, v, key, keys_seen, seen, factor, top, total, acc,
                k_stride_t, v_stride_t, D, DP, MATRIX,
            )  # fmt: skip
    for step in range(clear, cut):
        top, total, acc = _tile(
            block, k, v, step * BN + tl.arange(0, BN), keys_seen, None, factor, top, total, acc,
            k_stride_t, v_stride_t, D, DP, MATRIX,
        )  # fmt: skip
    for step in range(cut, stop):
        key = step * BN + tl.arange(0, BN)
        seen = _seen(position, key[None, :], keys_seen, window, sink_tokens, CAUSAL, WINDOW)
        top, total, acc = _tile(
            block, k, v, key, keys_seen, seen, factor, top, total, acc,
            k_stride_t, v_stride_t, D, DP, MATRIX,
        )  # fmt: skip
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    where = (at * tl.num_programs(1) + head) * D + column
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=ours)


@triton.jit
def _tile(
    block, k, v, key, tokens, seen, factor, top, total, acc, k_stride_t, v_stride_t,
    D: tl.constexpr, DP: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """(top, total, acc) after one more tile of keys, as `softmax_step` has them. seen [BM, BN]:
    which count; None for all, which are then all there."""
    column = tl.arange(0, DP)[None, :]
    at = key.to(tl.int64)[:, None]
    if seen is not None:
        ok = (key < tokens)[:, None] & (column < D)
        keys = tl.load(k + at * k_stride_t + column, mask=ok, other=0.0)
    elif D == DP:
        keys = tl.load(k + at * k_stride_t + column)
    else:
        keys = tl.load(k + at * k_stride_t + column, mask=column < D, other=0.0)
    blank = tl.zeros((block.shape[0], key.shape[0]), tl.float32)
    scores = product(block, tl.trans(keys), blank, MATRIX)
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1) * factor)
    base = higher
    if seen is not None:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(top - base)
    if seen is not None:
        values = tl.load(v + at * v_stride_t + column, mask=ok, other=0.0)
    elif D == DP:
        values = tl.load(v + at * v_stride_t + column)
    else:
        values = tl.load(v + at * v_stride_t + column, mask=column < D, other=0.0)
    total = total * shrink + tl.sum(weights, axis=1)
    return higher, total, product(weights.to(values.dtype), values, acc * shrink[:, None], MATRIX)


@triton.jit
def _clear_blocks(
    row, tokens, window, first, stop,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(clear, cut), within first..stop: blocks clear..cut are seen whole by all queries from
    position `row` on."""
    cut = tokens // BN
    if CAUSAL:
        cut = tl.minimum(cut, (row + 1) // BN)
    clear = first
    if WINDOW:
        clear = tl.cdiv(tl.maximum(row + BM - window, 0), BN)
        cut = tl.minimum(cut, (row + window) // BN)
    clear = tl.minimum(tl.maximum(clear, first), stop)
    return clear, tl.minimum(tl.maximum(cut, clear), stop)


@triton.jit
def _key_blocks(
    row, tokens, window, sink_tokens,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(sinks, first, stop): the queries from position `row` on see blocks 0..sinks and first..stop
    of BN keys, sinks <= first."""
    stop = tokens
    if CAUSAL:
        stop = tl.minimum(stop, row + BM)
    first, sinks = 0, 0
    if WINDOW:
        first = tl.maximum(row - window + 1, 0) // BN
        stop = tl.minimum(stop, tl.maximum(row + BM + window - 1, sink_tokens))
        sinks = tl.minimum(tl.cdiv(sink_tokens, BN), first)
    return sinks, first, tl.cdiv(stop, BN)


@triton.jit
def _seen(query, key, tokens, window, sink_tokens, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool: whether a query sees a key, by their positions."""
    seen = key < tokens
    if CAUSAL:
        seen = seen & (key <= query)
    if WINDOW:
        seen = seen & ((tl.abs(query - key) < window) | (key < sink_tokens))
    return seen


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    causal: bool = True,
    window: int = 0,
    sink_tokens: int = 0,
    scale: float | None = None,
    key_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """See reference/attention_prefill.py. ValueError for float64 and for heads above 256."""
    target = target_of("prefill_attention", q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    run(_plan(target, q, k, v, starts, out, causal, window, sink_tokens, scale, key_starts))
    return out


def _plan(
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    causal: bool = True,
    window: int = 0,
    sink_tokens: int = 0,
    scale: float | None = None,
    key_starts: torch.Tensor | None = None,
) -> Plan:
    tokens, heads, width = q.shape
    tiles = f"{precision('prefill_attention', q.dtype)}-{head_size('prefill_attention', width)}"
    config = choose(f"prefill_attention/{tiles}", target, tokens)
    q, k, v, starts = packed(q), packed(k), packed(v), starts.contiguous()
    sequences = max(starts.shape[0] - 1, 0)
    blocks = tokens // config.constants["BM"] + sequences if tokens and sequences else 0
    args: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "starts": starts,
        "key_starts": None if key_starts is None else key_starts.contiguous(),
        "out": out,
        "factor": score_factor(width, scale),
        "sequences": sequences,
        "window": window,
        "sink_tokens": sink_tokens,
        "q_stride_t": q.stride(0),
        "q_stride_h": q.stride(1),
        "k_stride_t": k.stride(0),
        "k_stride_h": k.stride(1),
        "v_stride_t": v.stride(0),
        "v_stride_h": v.stride(1),
        "G": heads // k.shape[1],
        "D": width,
        "DP": max(power(width), 16),
        "CAUSAL": causal,
        "WINDOW": window > 0,
        **config.constants,
    }
    return Plan(prefill_attention_kernel, (blocks, heads), args, config)


def cases(target: Target) -> list[Case | Refused]:
    """4 sequences of 1024 tokens, 32 heads over 8, causal."""
    made: list[Case | Refused] = []
    for dtype, width in (
        (torch.float16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.float32, 256),
    ):
        q = torch.empty(4096, 32, width, dtype=dtype, device="meta")
        k = torch.empty(4096, 8, width, dtype=dtype, device="meta")
        plan = _plan(target, q, k, k, torch.empty(5, dtype=torch.int32, device="meta"), q)
        matrix = operands(plan.config, dtype)
        name = f"prefill_attention/{TYPES[dtype]}-{width}"
        made.append(shipped(name, plan, 4 * 4 * 32 * width * 1024 * 1024 // 2, matrix))
    return [*made, _chunks(target)]


def _chunks(target: Target) -> Case:
    """The last 1024 tokens of 4 sequences of 4096, each over all of its keys."""
    q = torch.empty(4096, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(16384, 8, 128, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(5, dtype=torch.int32, device="meta")
    plan = _plan(target, q, k, k, starts, q, key_starts=starts.clone())
    operations = 4 * 4 * 32 * 128 * 1024 * 3584
    return shipped(
        "prefill_attention/bf16-128-chunks", plan, operations, operands(plan.config, q.dtype)
    )
