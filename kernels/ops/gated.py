"""`gated`: SwiGLU and GEGLU over one matrix. See reference/gated.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import gated as reference
from kernels.reference.precision import wide


def _gated(x: torch.Tensor, activation: str) -> Out:
    checks.dims("gated: x", x, "[T, 2F]")
    checks.dtype("gated: x", x, checks.FLOATS)
    checks.need(
        x.shape[1] % 2 == 0, f"gated: x should have an even number of columns, not {x.shape[1]}."
    )
    checks.need(
        activation in reference.ACTIVATIONS,
        f"activation {activation!r} is not known; accepted are {', '.join(reference.ACTIVATIONS)}.",
    )
    return Out((x.shape[0], x.shape[1] // 2), x.dtype)


gated = define(reference.gated, _gated, "gated")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    exact = wide(x)
    gate, up = x.to(exact).chunk(2, dim=-1)
    grad = grad.to(exact)
    if ctx.activation == "silu":
        opened = torch.nn.functional.silu(gate)
        gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
    else:
        opened = torch.nn.functional.gelu(gate, approximate="tanh")
        gate_grad = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return torch.cat((gate_grad, grad * opened), dim=-1).to(x.dtype), None


register_autograd(gated, _save, _backward)
