"""The kernels of `quantize_rowwise_int8`, `int8_matmul` and `int8_linear`.

Sums are exact in int32; `int8_linear` scales them while they are in registers. Semantics:
reference/linear_int8.py. Called by kernels/ops/linear_int8.py on a CUDA or ROCm device.
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

# Adding and subtracting 1.5 * 2^23 leaves a float32 rounded to a whole number, half to even.
TO_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def quantize_rowwise_int8_kernel(x, q, scales, K, x_stride, BLOCK: tl.constexpr):
    """A program quantises its row, in two passes. q [M, K] is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)))
    scale = tl.div_rn(tl.max(largest, axis=0), 127.0)
    tl.store(scales + row, scale)
    divisor = tl.where(scale > 0, scale, float("inf"))
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        level = tl.div_rn(tl.load(x + k, mask=k < K, other=0.0).to(tl.float32), divisor)
        level = tl.minimum(tl.maximum(level, -127.0), 127.0)
        whole = (level + TO_WHOLE) - TO_WHOLE
        tl.store(q + row * K + k, whole.to(tl.int8), mask=k < K)


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    a, b, scales, weight_scales, bias, out, M, N, K, a_stride, b_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns are the program ids; scales None: the sums themselves.
    out [M, N] is contiguous. EVEN: K is a multiple of BK."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = (row < M)[:, None], (column < N)[None, :]
    a += (row * a_stride)[:, None]
    b += (column.to(tl.int64) * b_stride)[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + k[None, :], mask=ours if EVEN else ours & (k < K)[None, :], other=0)
        right = tl.load(b + k[:, None], mask=wanted if EVEN else wanted & (k < K)[:, None], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    at = out + (row * N)[:, None] + column[None, :]
    if scales is None:
        tl.store(at, acc, mask=ours & wanted)
    else:
        by_row = tl.load(scales + row, mask=row < M, other=0.0).to(tl.float32)
        by_column = tl.load(weight_scales + column, mask=column < N, other=0.0).to(tl.float32)
        y = acc.to(tl.float32) * by_row[:, None] * by_column[None, :]
        if bias is not None:
            y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=ours & wanted)


def quantize_rowwise_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference/linear_int8.py."""
    target = target_of("quantize_rowwise_int8", x)
    need_float("quantize_rowwise_int8", x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    run(plan_quantize(target, packed(x), q, scales))
    return q, scales


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As reference/linear_int8.py."""
    target = target_of("int8_matmul", a)
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    run(plan_product("int8_matmul", target, packed(a), packed(b), None, None, None, out))
    return out


def int8_linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    qweight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As reference/linear_int8.py, scaled in float32."""
    target = target_of("int8_linear", q)
    out = torch.empty(q.shape[0], qweight.shape[0], dtype=dtype, device=q.device)
    need_float("int8_linear", out)
    q, qweight = packed(q), packed(qweight)
    scales, weight_scales = scales.contiguous(), weight_scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    run(plan_product("int8_linear", target, q, qweight, scales, weight_scales, bias, out))
    return out


def plan_quantize(target: Target, x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> Plan:
    config = choose("quantize_rowwise_int8", target, x.shape[0])
    args: Arguments = dict(
        x=x, q=q, scales=scales, K=x.shape[1], x_stride=x.stride(0), **config.constants
    )
    return Plan(quantize_rowwise_int8_kernel, (x.shape[0],), args, config, fp_fusion=False)


def refused(op: str, target: Target) -> Refused | None:
    if target.dot:
        return None
    return Refused(op, target, "Triton compiles no int8 product for it; w8_linear does run there")


def plan_product(
    op: str,
    target: Target,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor | None,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> Plan:
    """ValueError where the target is refused."""
    if no := refused(op, target):
        raise no.error()
    config = choose("int8_matmul", target, a.shape[0])
    args: Arguments = dict(
        a=a, b=b, scales=scales, weight_scales=weight_scales, bias=bias, out=out, M=a.shape[0],
        N=b.shape[0], K=a.shape[1], a_stride=a.stride(0), b_stride=b.stride(0),
        EVEN=a.shape[1] % config.constants["BK"] == 0, **config.constants,
    )  # fmt: skip
    rows = triton.cdiv(a.shape[0], config.constants["BM"])
    grid = rows, triton.cdiv(b.shape[0], config.constants["BN"])
    return Plan(int8_matmul_kernel, grid, args, config)


def cases(target: Target) -> list[Case | Refused]:
    """Quantisation of a row, and products for every number of rows in the table."""
    x = torch.empty(16, WIDTH, dtype=torch.bfloat16, device="meta")
    q, scales = x.to(torch.int8), x[:, 0].float()
    made: list[Case | Refused] = [
        shipped("quantize_rowwise_int8/bf16", plan_quantize(target, x, q, scales), 2 * x.numel())
    ]
    if no := refused("int8_matmul", target):
        return [*made, no, no._replace(op="int8_linear")]
    weight = torch.empty(WIDTH, WIDTH, dtype=torch.int8, device="meta")
    for entry in configs("int8_matmul", target):
        rows = entry.rows or 4096
        operations = 2 * rows * WIDTH * WIDTH
        a = torch.empty(rows, WIDTH, dtype=torch.int8, device="meta")
        sums = torch.empty(rows, WIDTH, dtype=torch.int32, device="meta")
        plan = plan_product("int8_matmul", target, a, weight, None, None, None, sums)
        made.append(shipped(f"int8_matmul/rows{rows}", plan, operations, "int8"))
        by_row = torch.empty(rows, dtype=torch.float32, device="meta")
        by_column = torch.empty(WIDTH, dtype=torch.float32, device="meta")
        bias = torch.empty(WIDTH, dtype=torch.bfloat16, device="meta")
        out = sums.to(torch.bfloat16)
        plan = plan_product("int8_linear", target, a, weight, by_row, by_column, bias, out)
        made.append(shipped(f"int8_linear/bf16-rows{rows}", plan, operations, "int8"))
    return made
