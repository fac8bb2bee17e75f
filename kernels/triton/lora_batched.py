"""The kernels of `sgmv`: low-rank adapters, a different one for each row of a batch.

Rows are sorted by adapter as tokens are by expert. The product with `a` is cut along K, since r is
small and there would be little to do side by side; its parts are summed, in order, by the programs
that multiply with `b`. Semantics: reference/lora_batched.py. Called by kernels/ops/lora_batched.py
on a CUDA or ROCm device.
"""

import torch
import triton
import triton.language as tl

from kernels.reference.moe import Alignment, aligned_blocks
from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose
from kernels.triton.launch import target_of
from kernels.triton.moe import moe_align
from kernels.triton.plan import TYPES, Plan, operands, packed, power, precision, run, shipped
from kernels.triton.targets import Target
from kernels.triton.tile import product


@triton.jit(do_not_specialize=["routed", "splits"])
def shrink_kernel(
    x,
    a,
    rows,
    block_adapter,
    inner,
    routed,
    R,
    K,
    splits,
    x_stride,
    a_stride_l,
    a_stride_r,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Block of rows, tile of ranks and part of K are the program ids. inner [splits, T, r] float32
    is contiguous."""
    adapter = tl.load(block_adapter + tl.program_id(0))
    if adapter < 0:
        return
    row = tl.load(rows + tl.program_id(0) * BM + tl.arange(0, BM))
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2).to(tl.int64)
    ours, wanted = (row < routed)[:, None], (rank < R)[None, :]
    x += (row * x_stride)[:, None]
    a += adapter * a_stride_l + rank.to(tl.int64)[None, :] * a_stride_r
    size = tl.cdiv(tl.cdiv(K, BK), splits) * BK
    stop = tl.minimum((part + 1) * size, K)
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(part * size, stop, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + k[None, :], mask=ours & (k < stop)[None, :], other=0.0)
        right = tl.load(a + k[:, None], mask=wanted & (k < stop)[:, None], other=0.0)
        acc = product(left, right.to(left.dtype), acc, MATRIX)
    inner += ((part * routed + row) * R)[:, None] + rank[None, :]
    tl.store(inner, acc, mask=ours & wanted)


@triton.jit(do_not_specialize=["routed", "splits"])
def expand_kernel(
    inner,
    b,
    rows,
    block_adapter,
    scaling,
    out,
    routed,
    N,
    R,
    splits,
    b_stride_l,
    b_stride_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Block of rows and tile of columns are the program ids. out [T, N] is contiguous."""
    adapter = tl.load(block_adapter + tl.program_id(0))
    if adapter < 0:
        return
    row = tl.load(rows + tl.program_id(0) * BM + tl.arange(0, BM))
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = (row < routed)[:, None], (column < N)[None, :]
    b += adapter * b_stride_l + column.to(tl.int64)[None, :] * b_stride_n
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, R, BR):
        rank = start + tl.arange(0, BR)
        ok = ours & (rank < R)[None, :]
        left = tl.zeros((BM, BR), tl.float32)
        for part in range(splits):
            at = ((row + part * routed.to(tl.int64)) * R)[:, None] + rank[None, :]
            left += tl.load(inner + at, mask=ok, other=0.0)
        right = tl.load(b + rank[:, None], mask=wanted & (rank < R)[:, None], other=0.0)
        acc = product(left, right.to(tl.float32), acc, MATRIX)
    acc *= tl.load(scaling + adapter).to(tl.float32)
    out += (row * N)[:, None] + column[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=ours & wanted)


def sgmv(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapters: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """See reference/lora_batched.py. ValueError for float64."""
    target = target_of("sgmv", x)
    out = x.new_zeros(x.shape[0], b.shape[1])
    if out.numel() and a.shape[0] and a.shape[1]:
        config = _config(target, x, a)
        aligned = moe_align(adapters[:, None], a.shape[0], config.constants["BM"])
        for plan in _plans(config, x, a, b, aligned, scaling, out):
            run(plan)
    return out


def _config(target: Target, x: torch.Tensor, a: torch.Tensor) -> Config:
    """Tiles for the rows that an adapter has on average."""
    rows = triton.cdiv(x.shape[0], a.shape[0])
    return choose(f"sgmv/{precision('sgmv', x.dtype)}", target, rows)


def _plans(
    config: Config,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    aligned: Alignment,
    scaling: torch.Tensor,
    out: torch.Tensor,
) -> tuple[Plan, Plan]:
    """The product with `a`, then that with `b`."""
    for adapter in (a, b, scaling):
        precision("sgmv", adapter.dtype)
    x, a, b, tiles = packed(x), packed(a), packed(b), config.constants
    rank, blocks = a.shape[1], aligned.block_expert.shape[0]
    splits = max(1, min(tiles["SPLITS"], triton.cdiv(x.shape[1], tiles["BK"])))
    inner = torch.empty(splits, x.shape[0], rank, dtype=torch.float32, device=x.device)
    ranks = min(max(power(rank), 16), tiles["BR"])
    shared = {
        "rows": aligned.rows,
        "block_adapter": aligned.block_expert,
        "inner": inner,
        "routed": x.shape[0],
        "R": rank,
        "splits": splits,
        "BM": tiles["BM"],
        "BR": ranks,
        "MATRIX": tiles["MATRIX"],
    }
    shrink = {
        **shared,
        "x": x,
        "a": a,
        "K": x.shape[1],
        "x_stride": x.stride(0),
        "a_stride_l": a.stride(0),
        "a_stride_r": a.stride(1),
        "BK": tiles["BK"],
    }
    expand = {
        **shared,
        "b": b,
        "scaling": scaling.contiguous(),
        "out": out,
        "N": b.shape[1],
        "b_stride_l": b.stride(0),
        "b_stride_n": b.stride(1),
        "BN": tiles["BN"],
    }
    columns = triton.cdiv(b.shape[1], tiles["BN"])
    return (
        Plan(shrink_kernel, (blocks, triton.cdiv(rank, ranks), splits), shrink, config),
        Plan(expand_kernel, (blocks, columns), expand, config),
    )


def cases(target: Target) -> list[Case | Refused]:
    """32 adapters of rank 16 (and 4 of 64) on a layer [4096, 4096], for 32 and 2048 rows."""
    made: list[Case | Refused] = []
    for dtype, rows, count, rank in (
        (torch.bfloat16, 32, 32, 16),
        (torch.float16, 2048, 4, 64),
        (torch.float32, 32, 32, 16),
    ):
        x = torch.empty(rows, 4096, dtype=dtype, device="meta")
        a = torch.empty(count, rank, 4096, dtype=dtype, device="meta")
        b = torch.empty(count, 4096, rank, dtype=dtype, device="meta")
        config, scaling = _config(target, x, a), torch.empty(count, device="meta")
        block = config.constants["BM"]
        blocks = aligned_blocks(rows, count, block)
        places = torch.empty(blocks * block, dtype=torch.int64, device="meta")
        aligned = Alignment(places, places[:blocks], places[:1])
        plans = _plans(config, x, a, b, aligned, scaling, torch.empty_like(x))
        matrix = operands(config, dtype)
        operations = 2 * rows * rank * 4096
        name = f"{TYPES[dtype]}-rows{rows}-rank{rank}"
        made.append(shipped(f"sgmv/shrink-{name}", plans[0], operations, matrix))
        made.append(shipped(f"sgmv/expand-{name}", plans[1], operations))
    return made
