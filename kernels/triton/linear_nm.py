"""The kernels of `nm_linear`: weights of which n of every m neighbours are kept.

Only what is kept is read from memory. For few rows, x is gathered at the places that are kept; for
many, a tile of the weight is spread out again and multiplied as a dense one (Triton reaches no
sparse matrix unit). Semantics: reference/linear_nm.py. Called by kernels/ops/linear_nm.py on a CUDA
or ROCm device.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.reference.linear_nm import nm_pack
from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config, choose
from kernels.triton.launch import target_of
from kernels.triton.plan import TYPES, Plan, operands, packed, precision, run, shipped
from kernels.triton.targets import Target
from kernels.triton.tile import product

__all__ = ["cases", "nm_linear", "nm_pack"]


@triton.jit
def nm_gather_kernel(
    x,
    values,
    indices,
    out,
    N,
    KEPT,
    x_stride,
    value_stride,
    index_stride,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Row and tile of columns are the program ids; KEPT = K / OF * KEEP numbers of a weight's row.
    out [M, N] is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    wanted = (column < N)[:, None]
    place = column.to(tl.int64)[:, None]
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(0, KEPT, BK):
        kept = (start + tl.arange(0, BK))[None, :]
        ok = wanted & (kept < KEPT)
        value = tl.load(values + place * value_stride + kept, mask=ok, other=0.0)
        index = tl.load(indices + place * index_stride + kept, mask=ok, other=0)
        at = kept // KEEP * OF + index.to(tl.int32)
        given = tl.load(x + row * x_stride + at, mask=ok, other=0.0)
        acc += value.to(tl.float32) * given.to(tl.float32)
    total = tl.sum(acc, axis=1)
    tl.store(out + row * N + column, total.to(out.dtype.element_ty), mask=column < N)


@triton.jit(do_not_specialize=["M"])
def nm_spread_kernel(
    x,
    values,
    indices,
    out,
    M,
    N,
    K,
    x_stride,
    value_stride,
    index_stride,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Tiles of rows and of columns are the program ids. out [M, N] is contiguous."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = (row < M)[:, None], (column < N)[None, :]
    x += (row * x_stride)[:, None]
    values += (column.to(tl.int64) * value_stride)[None, :]
    indices += (column.to(tl.int64) * index_stride)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + k[None, :], mask=ours & (k < K)[None, :], other=0.0)
        ok = wanted & (k < K)[:, None]
        dense = tl.zeros((BK, BN), tl.float32)
        for kept in tl.static_range(KEEP):
            at = (k // OF * KEEP + kept)[:, None]
            index = tl.load(indices + at, mask=ok, other=0)
            here = ok & (index.to(tl.int32) == (k % OF)[:, None])
            dense += tl.load(values + at, mask=here, other=0.0).to(tl.float32)
        acc = product(a, dense.to(a.dtype), acc, MATRIX)
    out += (row * N)[:, None] + column[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=ours & wanted)


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, n: int, m: int
) -> torch.Tensor:
    """See reference/linear_nm.py. ValueError for float64."""
    target = target_of("nm_linear", x)
    out = torch.empty(x.shape[0], values.shape[0], dtype=x.dtype, device=x.device)
    run(_plan(target, x, values, indices, out, n, m))
    return out


def _plan(
    target: Target,
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    n: int,
    m: int,
) -> Plan:
    """Rows are gathered one by one where the table says GATHER, and else multiplied in tiles."""
    precision("nm_linear", values.dtype)
    config = choose(f"nm_linear/{precision('nm_linear', x.dtype)}", target, x.shape[0])
    x, values, indices = packed(x), packed(values), packed(indices)
    args = {
        "x": x,
        "values": values,
        "indices": indices,
        "out": out,
        "N": values.shape[0],
        "x_stride": x.stride(0),
        "value_stride": values.stride(0),
        "index_stride": indices.stride(0),
        "KEEP": n,
        "OF": m,
    }
    return _gather(config, args) if "GATHER" in config.constants else _spread(config, args)


def _gather(config: Config, args: dict[str, Any]) -> Plan:
    tiles = {"BN": config.constants["BN"], "BK": config.constants["BK"]}
    grid = (args["x"].shape[0], triton.cdiv(args["N"], tiles["BN"]))
    return Plan(nm_gather_kernel, grid, {**args, "KEPT": args["values"].shape[1], **tiles}, config)


def _spread(config: Config, args: dict[str, Any]) -> Plan:
    rows, columns = args["x"].shape
    tiles = config.constants
    grid = (triton.cdiv(rows, tiles["BM"]), triton.cdiv(args["N"], tiles["BN"]))
    return Plan(nm_spread_kernel, grid, {**args, "M": rows, "K": columns, **tiles}, config)


def cases(target: Target) -> list[Case | Refused]:
    """A weight [4096, 4096], 2:4 and 4:8, for 1 and 1024 rows."""
    made: list[Case | Refused] = []
    for dtype, rows, n, m in (
        (torch.float16, 1, 2, 4),
        (torch.bfloat16, 1024, 2, 4),
        (torch.float16, 1024, 4, 8),
        (torch.float32, 1024, 2, 4),
    ):
        x = torch.empty(rows, 4096, dtype=dtype, device="meta")
        values = torch.empty(4096, 4096 // m * n, dtype=dtype, device="meta")
        indices = torch.empty_like(values, dtype=torch.uint8)
        plan = _plan(target, x, values, indices, torch.empty_like(x), n, m)
        gathers = plan.kernel is nm_gather_kernel
        matrix = operands(plan.config, dtype)
        operations = 2 * rows * (values.numel() if gathers else 4096 * 4096)
        made.append(
            shipped(f"nm_linear/{n}of{m}-{TYPES[dtype]}-rows{rows}", plan, operations, matrix)
        )
    return made
