"""The kernel of `merge_states`: parts of an attention, joined by their log-sum-exp.

Semantics: reference/attention_paged.py. Called through attention_paged.py, which makes such parts.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.triton.configs import choose
from kernels.triton.launch import target_of
from kernels.triton.plan import Plan, power, precision, run
from kernels.triton.targets import Target


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_states_kernel(
    outs,
    lse,
    out,
    together,
    rows,
    parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    BR: tl.constexpr,
):
    """outs [parts, rows, D] and lse [parts, rows], contiguous -> out [rows, D], together [rows]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, DP)
    ours = row < rows
    top = tl.full((BR,), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, _part_lse(lse, part, rows, row))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, DP), tl.float32)
    for part in range(parts):
        share = tl.exp(_part_lse(lse, part, rows, row) - base)
        at = (part * rows.to(tl.int64) + row)[:, None] * D + column[None, :]
        # A part without tokens may hold anything, NaN too: it is not read.
        counts = (ours & (share > 0))[:, None] & (column < D)[None, :]
        acc += share[:, None] * tl.load(outs + at, mask=counts, other=0.0).to(tl.float32)
        total += share
    divisor = tl.where(total > 0, total, 1.0)
    merged = (acc / divisor[:, None]).to(out.dtype.element_ty)
    where = row[:, None] * D + column[None, :]
    tl.store(out + where, merged, mask=ours[:, None] & (column < D)[None, :])
    tl.store(together + row, top + tl.log(divisor), mask=ours)


@triton.jit
def _part_lse(lse, part, rows, row):
    return tl.load(lse + part * rows.to(tl.int64) + row, mask=row < rows, other=float("-inf"))


def merge_states(outs: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference/attention_paged.py. ValueError for float64."""
    target = target_of("merge_states", outs)
    precision("merge_states", outs.dtype)
    precision("merge_states", lse.dtype)
    out, together = torch.empty_like(outs[0]).contiguous(), torch.empty_like(lse[0]).contiguous()
    run(merge_plan(target, outs.contiguous(), lse.contiguous(), out, together))
    return out, together


def merge_plan(
    target: Target,
    outs: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    together: torch.Tensor,
) -> Plan:
    """For contiguous outs [n, S, H, D] and lse [n, S, H]; out and together are filled."""
    parts, sequences, heads, width = outs.shape
    rows = sequences * heads
    config = choose("merge_states", target, rows)
    args: dict[str, Any] = {
        "outs": outs,
        "lse": lse,
        "out": out,
        "together": together,
        "rows": rows,
        "parts": parts,
        "D": width,
        "DP": power(width),
        **config.constants,
    }
    return Plan(merge_states_kernel, (triton.cdiv(rows, config.constants["BR"]),), args, config)
