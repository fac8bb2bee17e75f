"""The kernel of `block_sparse_attention`: a mask says which keys a block of queries reads.

A program holds BM queries of one block and head, and passes over blocks that the mask leaves out
without reading them. Semantics: reference/attention_sparse.py. Called by
kernels/ops/attention_sparse.py on a CUDA or ROCm device.
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
from kernels.triton.tile import product, score_factor, softmax_step


@triton.jit(do_not_specialize=["tokens", "blocks"])
def block_sparse_attention_kernel(
    q,
    k,
    v,
    block_mask,
    out,
    factor,
    tokens,
    blocks,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Piece of a block of queries and head are the program ids. block_mask [H, blocks, blocks] and
    out [T, H, D] are contiguous; factor turns a product into a score in powers of two."""
    PIECES: tl.constexpr = (BLOCK + BM - 1) // BM
    block, head = tl.program_id(0) // PIECES, tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) % PIECES) * BM + tl.arange(0, BM)
    query = block * BLOCK + row
    column = tl.arange(0, DP)[None, :]
    ours = ((row < BLOCK) & (query < tokens))[:, None] & (column < D)
    at = query.to(tl.int64)[:, None]
    queries = tl.load(q + at * q_stride_t + head * q_stride_h + column, mask=ours, other=0.0)
    k += (head // G) * k_stride_h
    v += (head // G) * v_stride_h
    mask = block_mask + (head * blocks + block) * blocks
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    for other in range(block + 1 if CAUSAL else blocks):
        if tl.load(mask + other):
            for place in range(0, BLOCK, BN):
                inside = place + tl.arange(0, BN)
                key = other * BLOCK + inside
                ok = (inside < BLOCK) & (key < tokens)
                wanted = ok[:, None] & (column < D)
                at_key = key.to(tl.int64)[:, None]
                keys = tl.load(k + at_key * k_stride_t + column, mask=wanted, other=0.0)
                scores = product(queries, tl.trans(keys), tl.zeros((BM, BN), tl.float32), MATRIX)
                seen = ok[None, :] & ((key[None, :] <= query[:, None]) | (not CAUSAL))
                weights, shrink, top, total = softmax_step(scores * factor, seen, top, total)
                values = tl.load(v + at_key * v_stride_t + column, mask=wanted, other=0.0)
                acc = product(weights.to(values.dtype), values, acc * shrink[:, None], MATRIX)
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    where = (at * tl.num_programs(1) + head) * D + column
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=ours)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """See reference/attention_sparse.py. ValueError for float64 and for heads above 256."""
    target = target_of("block_sparse_attention", q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    run(_plan(target, q, k, v, block_mask, out, block, causal, scale))
    return out


def _plan(
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    out: torch.Tensor,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> Plan:
    op = "block_sparse_attention"
    tokens, heads, width = q.shape
    config = choose(f"{op}/{precision(op, q.dtype)}-{head_size(op, width)}", target, tokens)
    q, k, v, block_mask = packed(q), packed(k), packed(v), block_mask.contiguous()
    # A tile that is larger than a block would be computed to be masked.
    fit = max(power(block), 16)
    tiles = {"BM": min(config.constants["BM"], fit), "BN": min(config.constants["BN"], fit)}
    blocks = block_mask.shape[1]
    args: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "block_mask": block_mask,
        "out": out,
        "factor": score_factor(width, scale),
        "tokens": tokens,
        "blocks": blocks,
        "q_stride_t": q.stride(0),
        "q_stride_h": q.stride(1),
        "k_stride_t": k.stride(0),
        "k_stride_h": k.stride(1),
        "v_stride_t": v.stride(0),
        "v_stride_h": v.stride(1),
        "G": heads // k.shape[1],
        "D": width,
        "DP": max(power(width), 16),
        "BLOCK": block,
        "CAUSAL": causal,
        **config.constants,
        **tiles,
    }
    grid = (blocks * triton.cdiv(block, tiles["BM"]), heads)
    return Plan(block_sparse_attention_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """4096 tokens, 32 heads over 8, blocks of 64 of which a quarter is read."""
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
        mask = torch.empty(32, 64, 64, dtype=torch.bool, device="meta")
        plan = _plan(target, q, k, k, mask, q, 64)
        matrix = operands(plan.config, dtype)
        name = f"block_sparse_attention/{TYPES[dtype]}-{width}"
        made.append(shipped(name, plan, 4 * 32 * width * 4096 * 4096 // 8, matrix))
    return made
