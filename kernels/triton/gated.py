"""The kernel of `gated`: the activation of a gate, times what is let through.

No function of a device library is called: tanh is a logistic function of twice its argument.
Semantics: reference/gated.py. Called by kernels/ops/gated.py on a CUDA or ROCm device.
"""

import torch
import triton
import triton.language as tl

from kernels.triton.case import Case, Refused
from kernels.triton.configs import Config
from kernels.triton.launch import need_float, target_of
from kernels.triton.plan import Arguments, Plan, packed, run, shipped
from kernels.triton.targets import Target

BLOCK = 1024
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def gated_kernel(x, out, F, x_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Row and block of columns are the program ids. out [T, F] is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < F
    gate = tl.load(x + row * x_stride + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + F + column, mask=ok, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # gelu(g) = g (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (g + 0.044715 g^3), and
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        inner = TWICE_ROOT * (gate + 0.044715 * gate * gate * gate)
    opened = gate / (1.0 + tl.exp(-inner))
    tl.store(out + row * F + column, (opened * up).to(out.dtype.element_ty), mask=ok)


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """As reference/gated.py."""
    target_of("gated", x)
    need_float("gated", x)
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    run(plan(packed(x), activation, out))
    return out


def plan(x: torch.Tensor, activation: str, out: torch.Tensor) -> Plan:
    rows, columns = out.shape
    args: Arguments = dict(
        x=x, out=out, F=columns, x_stride=x.stride(0), GELU=activation == "gelu_tanh", BLOCK=BLOCK
    )
    return Plan(gated_kernel, (rows, triton.cdiv(columns, BLOCK)), args, Config(0, {}, 4, 1))


def cases(target: Target) -> list[Case | Refused]:
    """Both activations, over a width that is a multiple of 16."""
    made: list[Case | Refused] = []
    for activation, dtype in (("silu", torch.bfloat16), ("gelu_tanh", torch.float16)):
        x = torch.empty(64, 2 * 14336, dtype=dtype, device="meta")
        out = torch.empty(64, 14336, dtype=dtype, device="meta")
        name = f"gated/{activation}-{str(dtype).removeprefix('torch.')}"
        made.append(shipped(name, plan(x, activation, out), 6 * out.numel()))
    return made
