"""The kernel of `fp8_linear`: activations and weights of 8 bits, e4m3fn.

Only where the hardware has that format: other targets are refused by name. Semantics:
reference/linear_fp8.py. Called by kernels/ops/linear_fp8.py on a CUDA device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose, configs
from kernels.triton.launch import need_float, target_of
from kernels.triton.linear import WIDTH
from kernels.triton.plan import Arguments, Plan, packed, run, shipped
from kernels.triton.targets import Target


@triton.jit(do_not_specialize=["M"])
def fp8_linear_kernel(
    x, w, x_scales, w_scales, out, M, N, K, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns are the program ids. out [M, N] is contiguous. EVEN: K is a
    multiple of BK."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = (row < M)[:, None], (column < N)[None, :]
    x += (row * x_stride)[:, None]
    w += (column.to(tl.int64) * w_stride)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + k[None, :], mask=ours if EVEN else ours & (k < K)[None, :], other=0.0)
        b = tl.load(w + k[:, None], mask=wanted if EVEN else wanted & (k < K)[:, None], other=0.0)
        # Hopper's units keep 14 bits of a running sum: it is handed over to float32 every BK.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=BK)
    by_row = tl.load(x_scales + row, mask=row < M, other=0.0).to(tl.float32)
    by_column = tl.load(w_scales + column, mask=column < N, other=0.0).to(tl.float32)
    y = acc * by_row[:, None] * by_column[None, :]
    at = out + (row * N)[:, None] + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=ours & wanted)


def fp8_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As reference/linear_fp8.py. ValueError where the hardware has no e4m3fn."""
    target = target_of("fp8_linear", x)
    out = torch.empty(x.shape[0], w.shape[0], dtype=dtype, device=x.device)
    need_float("fp8_linear", out)
    scales = x_scales.contiguous(), w_scales.contiguous()
    run(plan_product(target, packed(x), packed(w), *scales, out))
    return out


def refused(target: Target) -> Refused | None:
    if target.fp8:
        return None
    why = "its hardware has no float8 in the e4m3fn format"
    if target.name == "gfx942":
        why += " but in e4m3fnuz, which has another bias"
    return Refused("fp8_linear", target, why)


def plan_product(
    target: Target,
    x: torch.Tensor,
    w: torch.Tensor,
    x_scales: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
) -> Plan:
    """ValueError where the target is refused."""
    if no := refused(target):
        raise no.error()
    config = choose("fp8_linear", target, x.shape[0])
    args: Arguments = dict(
        x=x, w=w, x_scales=x_scales, w_scales=w_scales, out=out, M=x.shape[0], N=w.shape[0],
        K=x.shape[1], x_stride=x.stride(0), w_stride=w.stride(0),
        EVEN=x.shape[1] % config.constants["BK"] == 0, **config.constants,
    )  # fmt: skip
    rows = triton.cdiv(x.shape[0], config.constants["BM"])
    grid = rows, triton.cdiv(w.shape[0], config.constants["BN"])
    return Plan(fp8_linear_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """Products for every number of rows in the table, or the refusal."""
    if no := refused(target):
        return [no]
    made: list[Case | Refused] = []
    w = torch.empty(WIDTH, WIDTH, dtype=torch.float8_e4m3fn, device="meta")
    w_scales = torch.empty(WIDTH, dtype=torch.float32, device="meta")
    for entry in configs("fp8_linear", target):
        rows = entry.rows or 4096
        x = torch.empty(rows, WIDTH, dtype=torch.float8_e4m3fn, device="meta")
        x_scales = torch.empty(rows, dtype=torch.float32, device="meta")
        out = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device="meta")
        plan = plan_product(target, x, w, x_scales, w_scales, out)
        name = f"fp8_linear/bf16-rows{rows}"
        made.append(shipped(name, plan, 2 * rows * WIDTH * WIDTH, "fp8"))
    return made
