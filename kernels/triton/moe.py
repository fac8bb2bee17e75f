"""The kernels of `moe_align` and `grouped_linear`: products with experts, no token dropped.

Tokens are sorted by expert into blocks that never mix two experts; a program multiplies one block
with a tile of its expert's weight. Semantics: reference/moe.py. Called by kernels/ops/moe.py on a
CUDA or ROCm device; `lora_batched.py` sorts its rows by adapter the same way.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.reference.moe import Alignment, aligned_blocks
from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose
from kernels.triton.launch import target_of
from kernels.triton.plan import TYPES, Plan, operands, packed, power, precision, run, shipped
from kernels.triton.targets import Target
from kernels.triton.tile import product


@triton.jit(do_not_specialize=["routed"])
def count_kernel(expert_ids, counts, routed, CHUNK: tl.constexpr):
    """A program counts the tokens of its expert."""
    expert = tl.program_id(0)
    found = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, routed, CHUNK):
        place = start + tl.arange(0, CHUNK)
        found += (tl.load(expert_ids + place, mask=place < routed, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["routed", "experts"])
def place_kernel(
    expert_ids,
    counts,
    rows,
    block_expert,
    used_blocks,
    routed,
    experts,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program writes the rows of its expert, in order, behind those of the experts before it."""
    expert = tl.program_id(0)
    each = tl.arange(0, EP)
    count = tl.load(counts + each, mask=each < experts, other=0)
    taken = tl.cdiv(count, BLOCK).to(tl.int64)
    first = tl.sum(tl.where(each < expert, taken, 0), axis=0)
    mine = tl.sum(tl.where(each == expert, taken, 0), axis=0)
    if expert == experts - 1:
        tl.store(used_blocks, first + mine)
    for start in range(0, mine, CHUNK):
        block = start + tl.arange(0, CHUNK)
        tl.store(block_expert + first + block, expert.to(tl.int64), mask=block < mine)
    written = first * BLOCK
    for start in range(0, routed, CHUNK):
        place = start + tl.arange(0, CHUNK)
        ours = tl.load(expert_ids + place, mask=place < routed, other=-1) == expert
        rank = tl.cumsum(ours.to(tl.int32), axis=0)
        tl.store(rows + written + rank - 1, place.to(tl.int64), mask=ours)
        written += tl.sum(ours.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["routed"])
def grouped_linear_kernel(
    x,
    weight,
    rows,
    block_expert,
    out,
    routed,
    N,
    K,
    x_stride,
    weight_stride_e,
    weight_stride_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MATRIX: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Block of rows and tile of columns are the program ids; out [R, N] is contiguous. EVEN: K is
    a multiple of BK."""
    expert = tl.load(block_expert + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(rows + tl.program_id(0) * BM + tl.arange(0, BM))
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = (row < routed)[:, None], (column < N)[None, :]
    x += (row * x_stride)[:, None]
    weight += expert * weight_stride_e + column.to(tl.int64)[None, :] * weight_stride_n
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        ok = ours if EVEN else ours & (k < K)[None, :]
        a = tl.load(x + k[None, :], mask=ok, other=0.0)
        ok = wanted if EVEN else wanted & (k < K)[:, None]
        b = tl.load(weight + k[:, None], mask=ok, other=0.0)
        acc = product(a, b, acc, MATRIX)
    out += (row * N)[:, None] + column[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=ours & wanted)


def moe_align(expert_ids: torch.Tensor, experts: int, block: int) -> Alignment:
    """See reference/moe.py."""
    plans, made = _align_plans(target_of("moe_align", expert_ids), expert_ids, experts, block)
    for plan in plans:
        run(plan)
    return made


def _align_plans(
    target: Target, expert_ids: torch.Tensor, experts: int, block: int
) -> tuple[tuple[Plan, Plan], Alignment]:
    """The two launches, and what they fill."""
    flat = expert_ids.reshape(-1)
    routed, device = flat.numel(), flat.device
    blocks = aligned_blocks(routed, experts, block)
    made = Alignment(
        torch.full((blocks * block,), routed, dtype=torch.int64, device=device),
        torch.full((blocks,), -1, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    config = choose("moe_align", target, routed)
    grid = (experts if routed else 0,)
    shared: dict[str, Any] = {
        "expert_ids": flat,
        "counts": counts,
        "routed": routed,
        **config.constants,
    }
    place = {**shared, **made._asdict(), "experts": experts, "EP": power(experts), "BLOCK": block}
    count = Plan(count_kernel, grid, shared, config)
    return (count, Plan(place_kernel, grid, place, config)), made


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """See reference/moe.py. ValueError for float64."""
    target = target_of("grouped_linear", x)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if out.numel() and weight.shape[0]:
        config = _config(target, x, weight)
        aligned = moe_align(expert_ids[:, None], weight.shape[0], config.constants["BM"])
        run(_grouped_plan(config, x, weight, aligned, out))
    return out


def _config(target: Target, x: torch.Tensor, weight: torch.Tensor) -> Config:
    """Tiles for the rows that an expert has on average."""
    rows = triton.cdiv(x.shape[0], weight.shape[0])
    return choose(f"grouped_linear/{precision('grouped_linear', x.dtype)}", target, rows)


def _grouped_plan(
    config: Config, x: torch.Tensor, weight: torch.Tensor, aligned: Alignment, out: torch.Tensor
) -> Plan:
    x, weight = packed(x), packed(weight)
    args: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "rows": aligned.rows,
        "block_expert": aligned.block_expert,
        "out": out,
        "routed": x.shape[0],
        "N": weight.shape[1],
        "K": weight.shape[2],
        "x_stride": x.stride(0),
        "weight_stride_e": weight.stride(0),
        "weight_stride_n": weight.stride(1),
        "EVEN": weight.shape[2] % config.constants["BK"] == 0,
        **config.constants,
    }
    tiles = triton.cdiv(weight.shape[1], config.constants["BN"])
    return Plan(grouped_linear_kernel, (aligned.block_expert.shape[0], tiles), args, config)


def cases(target: Target) -> list[Case | Refused]:
    """8 experts [4096, 4096], for 16 and 4096 rows."""
    ids = torch.empty(2048, 2, dtype=torch.int64, device="meta")
    align = _align_plans(target, ids, 8, 64)[0]
    made: list[Case | Refused] = [
        shipped(f"moe_align/{name}", plan, 8 * ids.numel())
        for name, plan in zip(("count", "place"), align, strict=True)
    ]
    for dtype, rows in (
        (torch.bfloat16, 16),
        (torch.float16, 4096),
        (torch.bfloat16, 4096),
        (torch.float32, 4096),
    ):
        x = torch.empty(rows, 4096, dtype=dtype, device="meta")
        weight = torch.empty(8, 4096, 4096, dtype=dtype, device="meta")
        config = _config(target, x, weight)
        ids = torch.empty(rows, 1, dtype=torch.int64, device="meta")
        aligned = _align_plans(target, ids, 8, config.constants["BM"])[1]
        plan = _grouped_plan(config, x, weight, aligned, torch.empty_like(x))
        matrix = operands(plan.config, dtype)
        name = f"grouped_linear/{TYPES[dtype]}-rows{rows}"
        made.append(shipped(name, plan, 2 * rows * 4096 * 4096, matrix))
    return made
