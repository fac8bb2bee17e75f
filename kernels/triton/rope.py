"""The kernel of `rope`: queries and keys rotated to their positions, in one launch.

A program rotates a few heads of one token. Semantics: reference/rope.py. Called by
kernels/ops/rope.py on a CUDA or ROCm device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config
from kernels.triton.launch import need_float, target_of
from kernels.triton.plan import Arguments, Plan, packed, power, run, shipped
from kernels.triton.targets import Target

HEADS = 4  # that one program rotates


@triton.jit
def _rotate(x, out, at, out_at, by_cos, by_sin, ok, HALF: tl.constexpr):
    first = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=ok, other=0.0).to(tl.float32)
    kept = out.dtype.element_ty
    tl.store(out + out_at, (first * by_cos - second * by_sin).to(kept), mask=ok)
    tl.store(out + out_at + HALF, (second * by_cos + first * by_sin).to(kept), mask=ok)


@triton.jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    cos_stride, sin_stride,
    H: tl.constexpr, KH: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token and group of heads are the program ids; the groups of k stand behind those of q.
    q_out [T, H, 2 HALF] and k_out [T, KH, 2 HALF] are contiguous."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    used = column < HALF
    by_cos = tl.load(cos + token * cos_stride + column, mask=used, other=0.0).to(tl.float32)
    by_sin = tl.load(sin + token * sin_stride + column, mask=used, other=0.0).to(tl.float32)
    groups: tl.constexpr = (H + HEADS - 1) // HEADS
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    if tl.program_id(1) < groups:
        at = token * q_stride_t + head.to(tl.int64) * q_stride_h + column
        out_at = (token * H + head) * (2 * HALF) + column
        _rotate(q, q_out, at, out_at, by_cos, by_sin, used & (head < H), HALF)
    else:
        head -= groups * HEADS
        at = token * k_stride_t + head.to(tl.int64) * k_stride_h + column
        out_at = (token * KH + head) * (2 * HALF) + column
        _rotate(k, k_out, at, out_at, by_cos, by_sin, used & (head < KH), HALF)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference/rope.py."""
    target_of("rope", q)
    need_float("rope", q)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.shape[2]:
        run(plan(packed(q), packed(k), packed(cos), packed(sin), q_out, k_out))
    return q_out, k_out


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> Plan:
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    args: Arguments = dict(
        q=q, k=k, cos=cos, sin=sin, q_out=q_out, k_out=k_out, q_stride_t=q.stride(0),
        q_stride_h=q.stride(1), k_stride_t=k.stride(0), k_stride_h=k.stride(1),
        cos_stride=cos.stride(0), sin_stride=sin.stride(0), H=heads, KH=kv_heads, HALF=width // 2,
        HEADS=HEADS, BLOCK=power(width // 2),
    )  # fmt: skip
    grid = tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    warps = min(max(HEADS * power(width // 2) // 128, 1), 4)
    return Plan(rope_kernel, grid, args, Config(0, {}, warps, 1))


def cases(target: Target) -> list[Case | Refused]:
    """Heads of 64, 128 and 256."""
    made: list[Case | Refused] = []
    for width, heads, kv_heads in ((64, 9, 3), (128, 32, 8), (256, 16, 8)):
        q = torch.empty(64, heads, width, dtype=torch.bfloat16, device="meta")
        k, cos = q[:, :kv_heads].clone(), torch.empty(64, width // 2, device="meta")
        made.append(shipped(f"rope/bf16-{width}", plan(q, k, cos, cos, q, k), 3 * q.numel()))
    return made
