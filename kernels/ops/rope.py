"""`rope`: queries and keys rotated to their positions. See reference/rope.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import rope as reference


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[Out, Out]:
    checks.dims("rope: q", q, "[T, H, D]")
    checks.dims("rope: k", k, "[T, KH, D]")
    tokens, _, width = q.shape
    checks.need(width % 2 == 0, f"rope: heads should be of an even size, not {width}.")
    checks.shape("rope: k", k, tokens, k.shape[1], width)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.shape(f"rope: {name}", table, tokens, width // 2)
        checks.dtype(f"rope: {name}", table, checks.FLOATS)
    checks.dtype("rope: q", q, checks.FLOATS)
    checks.dtype("rope: k", k, (q.dtype,))
    return Out(q.shape, q.dtype), Out(k.shape, k.dtype)


rope = define(reference.rope, _rope, "rope")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])


def _backward(
    ctx: Any, q_grad: torch.Tensor, k_grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Rotated back: the transpose of a rotation turns the other way. Tables have no gradient."""
    cos, sin = ctx.saved_tensors
    return *rope(q_grad, k_grad, cos, -sin), None, None


register_autograd(rope, _save, _backward)
