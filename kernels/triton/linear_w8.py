"""The kernels of `w8_linear` and `dequantize_w8`: weights of 8 bits, in groups with a scale.

Where one scale is for all of K it is applied to the sum. The weight is the left operand, which
matrix units take from registers. Semantics: reference/linear_w8.py. Called
by kernels/ops/linear_w8.py on a CUDA or ROCm device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import need_float, target_of
from kernels.triton.linear import WIDTH, by_hand, cut, sample
from kernels.triton.plan import Arguments, Plan, packed, run, shipped
from kernels.triton.split import part_of, parts_for, sum_plan, sums_for
from kernels.triton.targets import Target


@triton.jit
def _weights(
    qweight, scales, q_at, s_at, wanted, start, K,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BK]: the weights from value `start` on, zeros past K. Without their scale when
    G is 0, which stands for one scale for all of K."""
    k = (start + tl.arange(0, BK))[None, :]
    ok = wanted if EVEN else wanted & (k < K)
    levels = tl.load(qweight + q_at + k, mask=ok, other=0).to(tl.float32)
    if G > 0 and BK <= G:
        one = tl.load(scales + s_at + start // G, mask=wanted, other=0.0)
        levels *= one.to(tl.float32)
    elif G > 0:
        groups: tl.constexpr = BK // G
        group = start // G + tl.arange(0, groups)[None, :]
        # Where K is whole tiles no mask depends on it, and scales are fetched ahead as tiles are.
        ok = wanted if EVEN else wanted & (group * G < K)
        some = tl.load(scales + s_at + group, mask=ok, other=0.0)
        spread = tl.broadcast_to(some.to(tl.float32)[:, :, None], (BN, groups, G))
        levels *= tl.reshape(spread, (BN, BK))
    return levels


@triton.jit(do_not_specialize=["M"])
def w8_linear_kernel(
    x, qweight, scales, bias, out, M, N, K, x_stride, q_stride, s_stride,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns and the part of K are the program ids. out [parts, M, N] is
    contiguous. EVEN: K is a multiple of BK."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[None, :]
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = row < M, (column < N)[:, None]
    q_at = column.to(tl.int64)[:, None] * q_stride
    s_at = column.to(tl.int64)[:, None] * s_stride
    x += row * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    first, stop = part_of(K, BK)
    for start in range(first, stop, BK):
        k = (start + tl.arange(0, BK))[:, None]
        weight = _weights(qweight, scales, q_at, s_at, wanted, start, K, G, BN, BK, EVEN)
        a = tl.load(x + k, mask=ours if EVEN else ours & (k < K), other=0.0)
        acc = tl.dot(weight.to(a.dtype), a, acc)
    acc = _finish(acc, scales, bias, column[:, None], s_stride, N, G)
    at = out + (tl.program_id(2).to(tl.int64) * M + row) * N + column[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=ours & wanted)


@triton.jit
def w8_vector_kernel(
    x, qweight, scales, bias, out, N, K, x_stride, q_stride, s_stride,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile of columns and row are the program ids; no matrix unit. out [M, N] is contiguous."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    wanted = (column < N)[:, None]
    q_at = column.to(tl.int64)[:, None] * q_stride
    s_at = column.to(tl.int64)[:, None] * s_stride
    x += row * x_stride
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK))[None, :]
        weight = _weights(qweight, scales, q_at, s_at, wanted, start, K, G, BN, BK, EVEN)
        acc += weight * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    total = _finish(tl.sum(acc, axis=1), scales, bias, column, s_stride, N, G)
    tl.store(out + row * N + column, total.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def _finish(acc, scales, bias, column, s_stride, N, G: tl.constexpr):
    """acc, times the scales of its columns if they are one for all of K, plus the bias."""
    if G == 0:
        at = column.to(tl.int64) * s_stride
        acc *= tl.load(scales + at, mask=column < N, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    return acc


@triton.jit
def dequantize_w8_kernel(
    qweight, scales, out, N, K, q_stride, s_stride,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns are the program ids. out [N, K] is contiguous."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    start = tl.program_id(1) * BK
    wanted = row < N
    q_at, s_at = row * q_stride, row * s_stride
    weight = _weights(qweight, scales, q_at, s_at, wanted, start, K, G, BN, BK, EVEN)
    if G == 0:
        weight *= tl.load(scales + s_at, mask=wanted, other=0.0).to(tl.float32)
    k = (start + tl.arange(0, BK))[None, :]
    tl.store(out + row * K + k, weight.to(out.dtype.element_ty), mask=wanted & (k < K))


def w8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference/linear_w8.py; the ways are those of `linear_w4.w4_linear`."""
    target = target_of("w8_linear", x)
    need_float("w8_linear", x)
    x = packed(x)
    out = x.new_empty(x.shape[0], qweight.shape[0])
    plans = plan_linear(target, x, qweight, scales, bias, out)
    if not plans:
        return by_hand(x, dequantize_w8(qweight, scales, x.dtype), bias)
    for plan in plans:
        run(plan)
    return out


def dequantize_w8(qweight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As reference/linear_w8.py, in float32."""
    target = target_of("dequantize_w8", qweight)
    out = torch.empty(qweight.shape, dtype=dtype, device=qweight.device)
    need_float("dequantize_w8", out)
    run(plan_dequantize(target, qweight, scales, out))
    return out


def plan_linear(
    target: Target,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[Plan, ...]:
    """The product, and the sum of its parts if it has any; nothing where torch multiplies with
    dequantised weights."""
    chosen = cut("w8_linear", target, x)
    if chosen is None:
        return ()
    (rows, k), columns = x.shape, qweight.shape[0]
    qweight, scales = packed(qweight), packed(scales)
    sizes = {"M": rows, "N": columns, "K": k, "G": _group(k, scales)}
    strides = {"x_stride": x.stride(0), "q_stride": qweight.stride(0), "s_stride": scales.stride(0)}
    tensors = dict(x=x, qweight=qweight, scales=scales, bias=bias, out=out)
    even = k % chosen.constants["BK"] == 0
    args = {**tensors, **sizes, **strides, "EVEN": even, **chosen.constants}
    blocks = triton.cdiv(columns, chosen.constants["BN"])
    if "BM" not in chosen.constants:
        del args["M"]
        return (Plan(w8_vector_kernel, (blocks, rows), args, chosen),)
    tiles = triton.cdiv(rows, chosen.constants["BM"]), blocks
    parts = parts_for(chosen, tiles[0] * blocks, triton.cdiv(k, chosen.constants["BK"]))
    if parts == 1:
        return (Plan(w8_linear_kernel, (*tiles, 1), args, chosen),)
    sums = sums_for(out, parts)
    args |= {"out": sums, "bias": None}
    return Plan(w8_linear_kernel, (*tiles, parts), args, chosen), sum_plan(target, sums, bias, out)


def plan_dequantize(
    target: Target, qweight: torch.Tensor, scales: torch.Tensor, out: torch.Tensor
) -> Plan:
    config = choose("dequantize_w8", target, out.shape[0])
    rows, k = out.shape
    qweight, scales = packed(qweight), packed(scales)
    args: Arguments = dict(
        qweight=qweight, scales=scales, out=out, N=rows, K=k, q_stride=qweight.stride(0),
        s_stride=scales.stride(0), G=_group(k, scales),
        EVEN=k % config.constants["BK"] == 0, **config.constants,
    )  # fmt: skip
    grid = triton.cdiv(rows, config.constants["BN"]), triton.cdiv(k, config.constants["BK"])
    return Plan(dequantize_w8_kernel, grid, args, config)


def _group(k: int, scales: torch.Tensor) -> int:
    """G for the kernels: 0 for one scale for all of K."""
    return 0 if scales.shape[1] <= 1 else k // scales.shape[1]


def cases(target: Target) -> list[Case | Refused]:
    """Products for every number of rows in the table: Q8_0's groups, Q6_K's, and per channel."""
    made: list[Case | Refused] = []
    kinds = {
        "bf16-g32": (torch.bfloat16, 32, torch.float16),
        "bf16-g16": (torch.bfloat16, 16, torch.float32),
        "fp16-channel": (torch.float16, WIDTH, torch.float32),
    }
    for kind, (dtype, group, kept) in kinds.items():
        qweight = torch.empty(WIDTH, WIDTH, dtype=torch.int8, device="meta")
        scales = torch.empty(WIDTH, WIDTH // group, dtype=kept, device="meta")
        for x, out in sample("w8_linear", target, dtype):
            plan = plan_linear(target, x, qweight, scales, None, out)[0]
            matrix = "half" if "BM" in plan.config.constants else ""
            name = f"w8_linear/{kind}-rows{x.shape[0]}"
            made.append(shipped(name, plan, 2 * x.shape[0] * WIDTH * WIDTH, matrix))
        out = torch.empty(WIDTH, WIDTH, dtype=dtype, device="meta")
        plan = plan_dequantize(target, qweight, scales, out)
        made.append(shipped(f"dequantize_w8/{kind}", plan, WIDTH * WIDTH))
    return made
