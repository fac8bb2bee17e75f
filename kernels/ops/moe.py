"""`moe_align`, `grouped_linear` and its weight gradient. See reference/moe.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import moe as reference


def _plain_align(
    expert_ids: torch.Tensor, experts: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch's schemas have it, where results have no names: rows, block_expert, used_blocks."""
    return reference.moe_align(expert_ids, experts, block)


def _align(expert_ids: torch.Tensor, experts: int, block: int) -> tuple[Out, Out, Out]:
    checks.dims("moe_align: expert_ids", expert_ids, "[T, topk]")
    checks.dtype("moe_align: expert_ids", expert_ids, checks.INTEGERS)
    checks.need(
        experts >= 1 and block >= 1,
        f"moe_align: experts ({experts}) and block ({block}) should be 1 or more.",
    )
    blocks = reference.aligned_blocks(expert_ids.shape[0] * expert_ids.shape[1], experts, block)
    return Out((blocks * block,), torch.int64), Out((blocks,), torch.int64), Out((1,), torch.int64)


def _linear(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> Out:
    op = "grouped_linear"
    checks.dims(f"{op}: x", x, "[R, K]")
    checks.dims(f"{op}: weight", weight, "[E, N, K]")
    checks.dtype(f"{op}: x", x, checks.FLOATS)
    checks.dtype(f"{op}: weight", weight, (x.dtype,))
    checks.shape(f"{op}: weight", weight, weight.shape[0], weight.shape[1], x.shape[1])
    checks.shape(f"{op}: expert_ids", expert_ids, x.shape[0])
    checks.dtype(f"{op}: expert_ids", expert_ids, checks.INTEGERS)
    return Out((x.shape[0], weight.shape[1]), x.dtype)


def _outer(left: torch.Tensor, right: torch.Tensor, expert_ids: torch.Tensor, experts: int) -> Out:
    op = "grouped_outer"
    checks.dims(f"{op}: left", left, "[R, N]")
    checks.dims(f"{op}: right", right, "[R, K]")
    checks.shape(f"{op}: right", right, left.shape[0], right.shape[1])
    checks.shape(f"{op}: expert_ids", expert_ids, left.shape[0])
    checks.dtype(f"{op}: left", left, checks.FLOATS)
    checks.dtype(f"{op}: right", right, (left.dtype,))
    checks.dtype(f"{op}: expert_ids", expert_ids, checks.INTEGERS)
    return Out((experts, left.shape[1], right.shape[1]), right.dtype)


moe_align = define(_plain_align, _align, "moe", name="moe_align")
grouped_linear = define(reference.grouped_linear, _linear, "moe")
grouped_outer = define(reference.grouped_outer, _outer, None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, expert_ids = ctx.saved_tensors
    grad, x_grad, weight_grad = grad.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        x_grad = grouped_linear(grad, weight.transpose(1, 2).contiguous(), expert_ids)
    if ctx.needs_input_grad[1]:
        weight_grad = grouped_outer(grad, x, expert_ids, weight.shape[0])
    return x_grad, weight_grad, None


register_autograd(grouped_linear, _save, _backward)
