"""`sgmv`: an adapter of its own for each row. See reference/lora_batched.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.ops.moe import grouped_linear, grouped_outer
from kernels.reference import lora_batched as reference
from kernels.reference.precision import wide


def _sgmv(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapters: torch.Tensor,
    scaling: torch.Tensor,
) -> Out:
    checks.dims("sgmv: x", x, "[T, K]")
    checks.dims("sgmv: a", a, "[L, r, K]")
    checks.dims("sgmv: b", b, "[L, N, r]")
    checks.shape("sgmv: a", a, a.shape[0], a.shape[1], x.shape[1])
    checks.shape("sgmv: b", b, a.shape[0], b.shape[1], a.shape[1])
    checks.shape("sgmv: adapters", adapters, x.shape[0])
    checks.shape("sgmv: scaling", scaling, a.shape[0])
    checks.dtype("sgmv: adapters", adapters, (torch.int64,))
    checks.dtype("sgmv: x", x, checks.FLOATS)
    for name, given in (("a", a), ("b", b), ("scaling", scaling)):
        checks.dtype(f"sgmv: {name}", given, checks.FLOATS)
    return Out((x.shape[0], b.shape[1]), x.dtype)


sgmv = define(reference.sgmv, _sgmv, "lora_batched")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Adapters are experts with two small products; what lies between them stays wide."""
    x, a, b, adapters, scaling = ctx.saved_tensors
    exact, count = wide(x), a.shape[0]
    if count == 0:
        return torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b), None, None
    wide_x, wide_a, wide_b = x.to(exact), a.to(exact), b.to(exact)
    scaled = grad.to(exact) * scaling.to(exact)[adapters.clamp(min=0)][:, None]
    inner_grad = grouped_linear(scaled, wide_b.transpose(1, 2).contiguous(), adapters)
    x_grad = a_grad = b_grad = None
    if ctx.needs_input_grad[0]:
        back = wide_a.transpose(1, 2).contiguous()
        x_grad = grouped_linear(inner_grad, back, adapters).to(x.dtype)
    if ctx.needs_input_grad[1]:
        a_grad = grouped_outer(inner_grad, wide_x, adapters, count).to(a.dtype)
    if ctx.needs_input_grad[2]:
        inner = grouped_linear(wide_x, wide_a, adapters)
        b_grad = grouped_outer(scaled, inner, adapters, count).to(b.dtype)
    return x_grad, a_grad, b_grad, None, None


register_autograd(sgmv, _save, _backward)
