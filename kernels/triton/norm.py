"""The kernel of `rms_norm` and `rms_norm_residual`: a program normalises one row.

Semantics: reference/norm.py. Called by kernels/ops/norm.py on a CUDA or ROCm device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config
from kernels.triton.launch import need_float, target_of
from kernels.triton.plan import Plan, packed, power, run, shipped
from kernels.triton.targets import Target

MOST = 32768  # numbers of a row; a program holds all of it in registers


@triton.jit
def rms_norm_kernel(
    x, residual, weight, y, added, N, x_stride, residual_stride, eps, BLOCK: tl.constexpr
):
    """The row is the program id. With a residual, what is normalised is the sum, rounded to the
    dtype of x, which `added` [rows, N] takes. y [rows, N] and added are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < N
    given = tl.load(x + row * x_stride + column, mask=ok, other=0.0).to(tl.float32)
    if residual is not None:
        kept = added.dtype.element_ty
        other = tl.load(residual + row * residual_stride + column, mask=ok, other=0.0)
        total = (given + other.to(tl.float32)).to(kept)
        tl.store(added + row * N + column, total, mask=ok)
        given = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(given * given, axis=0) / N + eps)
    scale = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + row * N + column, (given * inverse * scale).to(y.dtype.element_ty), mask=ok)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference/norm.py, for rows of up to 32768 numbers."""
    _launch("rms_norm", x, None, weight, eps, y := x.new_empty(x.shape), None)
    return y


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference/norm.py, for rows of up to 32768 numbers."""
    y, added = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch("rms_norm_residual", x, residual, weight, eps, y, added)
    return y, added


def _launch(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    added: torch.Tensor | None,
) -> None:
    target_of(op, x)
    need_float(op, x)
    n = x.shape[-1]
    if n > MOST:
        raise ValueError(f"{op} on a GPU takes rows of up to {MOST} numbers, not {n}.")
    if x.numel():
        flat = None if residual is None else packed(residual.reshape(-1, n))
        run(plan(packed(x.reshape(-1, n)), flat, weight.contiguous(), eps, y, added))


def plan(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    added: torch.Tensor | None,
) -> Plan:
    """x and residual [rows, n]. A thread has up to sixteen numbers of a row, in whole warps."""
    rows, n = x.shape
    block = power(n)
    config = Config(0, {}, min(max(block // 512, 1), 16), 1)
    args = dict(
        x=x, residual=residual, weight=weight, y=y, added=added, N=n, x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0), eps=eps, BLOCK=block,
    )  # fmt: skip
    return Plan(rms_norm_kernel, (rows,), args, config)


def cases(target: Target) -> list[Case | Refused]:
    """Rows of a small model's and a large one's width, and the longest."""
    made: list[Case | Refused] = []
    for width, dtype in ((576, torch.bfloat16), (4096, torch.float16), (MOST, torch.bfloat16)):
        x = torch.empty(64, width, dtype=dtype, device="meta")
        weight, name = x[0], f"{str(dtype).removeprefix('torch.')}-{width}"
        alone, both = plan(x, None, weight, 1e-5, x, None), plan(x, x, weight, 1e-5, x, x)
        made.append(shipped(f"rms_norm/{name}", alone, 4 * x.numel()))
        made.append(shipped(f"rms_norm_residual/{name}", both, 5 * x.numel()))
    return made
