"""`rms_norm` and `rms_norm_residual`. See reference/norm.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import norm as reference
from kernels.reference.precision import wide


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> Out:
    checks.need(x.dim() > 0, f"{op}: x should be [..., n], not a single number.")
    checks.dtype(f"{op}: x", x, checks.FLOATS)
    checks.dtype(f"{op}: weight", weight, (x.dtype,))
    checks.shape(f"{op}: weight", weight, x.shape[-1])
    return Out(x.shape, x.dtype)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Out:
    return _check("rms_norm", x, weight)


def _norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[Out, Out]:
    out = _check("rms_norm_residual", x, weight)
    checks.shape("rms_norm_residual: residual", residual, *x.shape)
    checks.dtype("rms_norm_residual: residual", residual, (x.dtype,))
    return out, out


rms_norm = define(reference.rms_norm, _norm, "norm")
rms_norm_residual = define(reference.rms_norm_residual, _norm_residual, "norm")


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x, still in float32, and of the weight, for a gradient of rms_norm(x, weight, eps)."""
    exact = wide(x)
    grad, wide_x, wide_weight = grad.to(exact), x.to(exact), weight.to(exact)
    inverse = (wide_x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = wide_x * inverse
    scaled = grad * wide_weight
    x_grad = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    weight_grad = (grad * unit).flatten(0, -2).sum(0) if x.dim() > 1 else grad * unit
    return x_grad, weight_grad.to(weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    x_grad, weight_grad = _gradients(grad, x, weight, ctx.eps)
    return x_grad.to(grad.dtype), weight_grad, None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.eps = inputs[3]
    ctx.save_for_backward(output[1], inputs[2])


def _backward_residual(
    ctx: Any, grad: torch.Tensor, added_grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Both summands have the same gradient: through the norm, and past it."""
    added, weight = ctx.saved_tensors
    x_grad, weight_grad = _gradients(grad, added, weight, ctx.eps)
    both = (x_grad + added_grad).to(grad.dtype)
    return both, both, weight_grad, None


register_autograd(rms_norm, _save, _backward)
register_autograd(rms_norm_residual, _save_residual, _backward_residual)
