"""A product's sum over K in several parts, so that few tiles still keep every multiprocessor busy.

Programs of one tile sum parts of K into float32, and a second kernel adds the parts in their order:
the result is the same bits every time. Used by linear_w4.py and linear_w8.py where the table of
tile sizes says how many programs a GPU wants.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose
from kernels.triton.plan import Arguments, Plan, shipped
from kernels.triton.targets import Target

FEWEST_STEPS = 3  # tiles along K of a part: fewer are over before their loads are under way


@triton.jit
def part_of(K, BK: tl.constexpr):
    """(start, stop): this program's part of K, in whole tiles, by its third id."""
    part, parts = tl.program_id(2), tl.num_programs(2)
    size = tl.cdiv(tl.cdiv(K, BK), parts) * BK
    return part * size, tl.minimum(part * size + size, K)


@triton.jit(do_not_specialize=["count", "parts"])
def sum_parts_kernel(sums, bias, out, count, parts, N, BLOCK: tl.constexpr):
    """sums [parts, count] -> out [count], both contiguous, plus bias [N] for rows of N."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ours = place < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = part * count.to(tl.int64) + place
        total += tl.load(sums + at, mask=ours, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % N, mask=ours, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=ours)


def parts_for(config: Config, tiles: int, steps: int) -> int:
    """How many parts K is cut into, given the programs without any and the tiles along K."""
    wanted = round(config.programs / max(tiles, 1))
    return max(1, min(wanted, steps // FEWEST_STEPS))


def sums_for(out: torch.Tensor, parts: int) -> torch.Tensor:
    """Where the programs store parts of out [M, N]: float32 [parts, M, N]."""
    return out.new_empty(parts, *out.shape, dtype=torch.float32)


def sum_plan(
    target: Target, sums: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> Plan:
    """Adds sums [parts, M, N] up into out [M, N], and the bias [N]."""
    count = out.numel()
    config = choose("sum_parts", target, out.shape[0])
    args: Arguments = dict(
        sums=sums, bias=bias, out=out, count=count, parts=sums.shape[0], N=out.shape[1],
        **config.constants,
    )  # fmt: skip
    grid = (triton.cdiv(count, config.constants["BLOCK"]),)
    return Plan(sum_parts_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """Four parts of 16 rows, with a bias and without."""
    out = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    sums = sums_for(out, 4)
    return [
        shipped("sum_parts/bf16", sum_plan(target, sums, None, out), sums.numel()),
        shipped("sum_parts/bf16-bias", sum_plan(target, sums, out[0], out), sums.numel()),
    ]
