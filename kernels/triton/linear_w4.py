"""The kernels of `w4_linear` and `dequantize_w4`: weights of 4 bits, in groups with a scale.

A byte holds two values that stand 16 apart, so a tile of bytes is two tiles of the weight, and x is
read in the two places that belong to them; nothing is moved around in registers. The weight is the
left operand, which matrix units take from registers: what is unpacked never goes through shared
memory. Semantics: reference/linear_w4.py. Called by kernels/ops/linear_w4.py on a CUDA or ROCm
device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import choose
from kernels.triton.launch import need_float, target_of
from kernels.triton.linear import WIDTH, by_hand, cut, sample
from kernels.triton.plan import Plan, packed, run, shipped
from kernels.triton.split import part_of, parts_for, sum_plan, sums_for
from kernels.triton.targets import Target

WHOLE = tl.constexpr(0x4B000000)  # of a float32 in whole numbers from 2 ** 23 on, with no bit set


@triton.jit
def _of_groups(
    stored, at, wanted, start, K,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BK / 2]: the number of each byte's group, for BK values from `start` on."""
    if BK <= G:
        one = tl.load(stored + at + start // G, mask=wanted, other=0.0).to(tl.float32)
        each = tl.broadcast_to(one, (BN, BK // 2))
    else:
        groups: tl.constexpr = BK // G
        group = start // G + tl.arange(0, groups)[None, :]
        # Where K is whole tiles no mask depends on it, and scales are fetched ahead as tiles are.
        ok = wanted if EVEN else wanted & (group * G < K)
        some = tl.load(stored + at + group, mask=ok, other=0.0)
        spread = tl.broadcast_to(some.to(tl.float32)[:, :, None], (BN, groups, G // 2))
        each = tl.reshape(spread, (BN, BK // 2))
    return each


@triton.jit
def _weights(
    qweight, scales, mins, q_at, s_at, wanted, start, K, whole,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(low, high) float32 [BN, BK / 2]: the weights in the low and the high halves of the bytes
    from value `start` on; zeros past K.

    A level becomes a float as the last bits of 2 ** 23, which is subtracted: the high ones come out
    16 times too large, and their scale is divided by that. All of it is exact.
    """
    byte = (start // 2 + tl.arange(0, BK // 2))[None, :]
    ok = wanted if EVEN else wanted & (byte < K // 2)
    levels = tl.load(qweight + q_at + byte, mask=ok, other=0).to(tl.int32)
    low = ((levels & 15) | whole).to(tl.float32, bitcast=True)
    high = ((levels & 240) | whole).to(tl.float32, bitcast=True)
    scale = _of_groups(scales, s_at, wanted, start, K, G, BN, BK, EVEN)
    if mins is None:
        low, high = (low - 8388616.0) * scale, (high - 8388736.0) * (scale * 0.0625)
    else:
        least = _of_groups(mins, s_at, wanted, start, K, G, BN, BK, EVEN)
        low, high = low - 8388608.0, high - 8388608.0
        low, high = low * scale + least, high * (scale * 0.0625) + least
    return low, high


@triton.jit
def _places(start, BK: tl.constexpr):
    """int32 [BK / 2]: where in K the low halves of the bytes from value `start` on stand."""
    byte = tl.arange(0, BK // 2)
    return start + byte // 16 * 32 + byte % 16


@triton.jit(do_not_specialize=["M"])
def w4_linear_kernel(
    x, qweight, scales, mins, bias, out, M, N, K, x_stride, q_stride, s_stride,
    G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns and the part of K are the program ids. out [parts, M, N] is
    contiguous. EVEN: K is a multiple of BK."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[None, :]
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ours, wanted = row < M, (column < N)[:, None]
    q_at = column.to(tl.int64)[:, None] * q_stride
    s_at = column.to(tl.int64)[:, None] * s_stride
    # As a constant it would cost an instruction for every weight: two of those do not fit in one.
    whole = WHOLE | (M >> 31)
    x += row * x_stride
    acc = tl.zeros((BN, BM), tl.float32)
    first, stop = part_of(K, BK)
    for start in range(first, stop, BK):
        low, high = _weights(
            qweight, scales, mins, q_at, s_at, wanted, start, K, whole, G, BN, BK, EVEN
        )
        k = _places(start, BK)[:, None]
        ok = ours if EVEN else ours & (k < K)
        a = tl.load(x + k, mask=ok, other=0.0)
        acc = tl.dot(low.to(a.dtype), a, acc)
        a = tl.load(x + k + 16, mask=ok, other=0.0)
        acc = tl.dot(high.to(a.dtype), a, acc)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    at = out + (tl.program_id(2).to(tl.int64) * M + row) * N + column[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=ours & wanted)


@triton.jit
def w4_vector_kernel(
    x, qweight, scales, mins, bias, out, N, K, x_stride, q_stride, s_stride,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tile of columns and row are the program ids; no matrix unit. out [M, N] is contiguous."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    wanted = (column < N)[:, None]
    q_at = column.to(tl.int64)[:, None] * q_stride
    s_at = column.to(tl.int64)[:, None] * s_stride
    whole = WHOLE | (N >> 31)
    x += row * x_stride
    acc = tl.zeros((BN, BK // 2), tl.float32)
    for start in range(0, K, BK):
        low, high = _weights(
            qweight, scales, mins, q_at, s_at, wanted, start, K, whole, G, BN, BK, EVEN
        )
        k = _places(start, BK)[None, :]
        ok = None if EVEN else k < K
        acc += low * tl.load(x + k, mask=ok, other=None if EVEN else 0.0).to(tl.float32)
        acc += high * tl.load(x + k + 16, mask=ok, other=None if EVEN else 0.0).to(tl.float32)
    total = tl.sum(acc, axis=1)
    if bias is not None:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, total.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def dequantize_w4_kernel(
    qweight, scales, mins, out, N, K, q_stride, s_stride,
    G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tiles of rows and of columns are the program ids. out [N, K] is contiguous."""
    row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    start = tl.program_id(1) * BK
    wanted = row < N
    q_at, s_at, whole = row * q_stride, row * s_stride, WHOLE | (N >> 31)
    low, high = _weights(
        qweight, scales, mins, q_at, s_at, wanted, start, K, whole, G, BN, BK, EVEN
    )
    k = _places(start, BK)[None, :]
    at = out + row * K + k
    ok = wanted & (k < K)
    tl.store(at, low.to(out.dtype.element_ty), mask=ok)
    tl.store(at + 16, high.to(out.dtype.element_ty), mask=ok)


def w4_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference/linear_w4.py. Halves of more rows than the table of tile sizes is for, and
    float32 or any dtype without matrix units above a few, take dequantised weights of x's dtype
    and torch's product."""
    target = target_of("w4_linear", x)
    need_float("w4_linear", x)
    x = packed(x)
    out = x.new_empty(x.shape[0], qweight.shape[0])
    plans = plan_linear(target, x, qweight, scales, mins, bias, out)
    if not plans:
        return by_hand(x, dequantize_w4(qweight, scales, mins, x.dtype), bias)
    for plan in plans:
        run(plan)
    return out


def dequantize_w4(
    qweight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As reference/linear_w4.py, in float32."""
    target = target_of("dequantize_w4", qweight)
    out = torch.empty(qweight.shape[0], 2 * qweight.shape[1], dtype=dtype, device=qweight.device)
    need_float("dequantize_w4", out)
    run(plan_dequantize(target, qweight, scales, mins, out))
    return out


def plan_linear(
    target: Target,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[Plan, ...]:
    """The product, and the sum of its parts if it has any; nothing where torch multiplies with
    dequantised weights."""
    chosen = cut("w4_linear", target, x)
    if chosen is None:
        return ()
    (rows, k), columns = x.shape, qweight.shape[0]
    scales, mins = _together(scales, mins)
    qweight = packed(qweight)
    sizes = {"M": rows, "N": columns, "K": k, "EVEN": k % chosen.constants["BK"] == 0}
    strides = {"x_stride": x.stride(0), "q_stride": qweight.stride(0), "s_stride": scales.stride(0)}
    tensors = dict(x=x, qweight=qweight, scales=scales, mins=mins, bias=bias, out=out)
    args = {**tensors, **sizes, **strides, "G": _group(k, scales), **chosen.constants}
    blocks = triton.cdiv(columns, chosen.constants["BN"])
    if "BM" not in chosen.constants:
        del args["M"]
        return (Plan(w4_vector_kernel, (blocks, rows), args, chosen),)
    tiles = triton.cdiv(rows, chosen.constants["BM"]), blocks
    parts = parts_for(chosen, tiles[0] * blocks, triton.cdiv(k, chosen.constants["BK"]))
    if parts == 1:
        return (Plan(w4_linear_kernel, (*tiles, 1), args, chosen),)
    sums = sums_for(out, parts)
    args |= {"out": sums, "bias": None}
    return Plan(w4_linear_kernel, (*tiles, parts), args, chosen), sum_plan(target, sums, bias, out)


def plan_dequantize(
    target: Target,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    out: torch.Tensor,
) -> Plan:
    config = choose("dequantize_w4", target, out.shape[0])
    rows, k = out.shape
    scales, mins = _together(scales, mins)
    qweight = packed(qweight)
    args = dict(
        qweight=qweight, scales=scales, mins=mins, out=out, N=rows, K=k,
        q_stride=qweight.stride(0), s_stride=scales.stride(0), G=_group(k, scales),
        EVEN=k % config.constants["BK"] == 0, **config.constants,
    )  # fmt: skip
    grid = triton.cdiv(rows, config.constants["BN"]), triton.cdiv(k, config.constants["BK"])
    # Not fused: a weight is a product, rounded, plus a minimum, as whoever stored it computed it.
    return Plan(dequantize_w4_kernel, grid, args, config, fp_fusion=False)


def _group(k: int, scales: torch.Tensor) -> int:
    return k // scales.shape[1] if k else 32


def _together(
    scales: torch.Tensor, mins: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both with the same strides, the last one 1."""
    scales = packed(scales)
    if mins is None or mins.stride() == scales.stride():
        return scales, mins
    return scales.contiguous(), mins.contiguous()


def cases(target: Target) -> list[Case | Refused]:
    """Products for every number of rows in the table, over the groups that files have."""
    made: list[Case | Refused] = []
    kinds = {
        "bf16-g32": (torch.bfloat16, 32, None),
        "bf16-g32-mins": (torch.bfloat16, 32, torch.float32),
        "fp16-g128-mins": (torch.float16, 128, torch.float16),
    }
    for kind, (dtype, group, least) in kinds.items():
        qweight = torch.empty(WIDTH, WIDTH // 2, dtype=torch.uint8, device="meta")
        kept = least or torch.float16
        scales = torch.empty(WIDTH, WIDTH // group, dtype=kept, device="meta")
        mins = scales.clone() if least else None
        for x, out in sample("w4_linear", target, dtype):
            plan = plan_linear(target, x, qweight, scales, mins, None, out)[0]
            matrix = "half" if "BM" in plan.config.constants else ""
            name = f"w4_linear/{kind}-rows{x.shape[0]}"
            made.append(shipped(name, plan, 2 * x.shape[0] * WIDTH * WIDTH, matrix))
        out = torch.empty(WIDTH, WIDTH, dtype=dtype, device="meta")
        plan = plan_dequantize(target, qweight, scales, mins, out)
        made.append(shipped(f"dequantize_w4/{kind}", plan, 2 * WIDTH * WIDTH))
    return made
