"""What crosses between the ranks that share each matrix (Megatron-LM, Shoeybi et al. 2019), and
between those that share the tokens outside of matrices as well (Korthikanti et al. 2022).

`column` goes into split matrices, `row` comes out of them. Without sequence parallelism one is free
forward and a sum backward, the other the reverse; with it they gather and scatter tokens, at the
same cost, and what lies between two layers is kept once instead of on every rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.collectives import added
from train.parallel.mesh import Axis

TOKENS = 1
"""The dimension that sequence parallelism cuts: x is (batch, tokens, hidden)."""


def column(x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """x times the transpose of this rank's rows of a matrix. sequence: x is this rank's tokens, and
    the product is of all; then x is gathered again on the way back instead of kept."""
    out: Tensor = _Column.apply(x, weight, axis, sequence)  # type: ignore[no-untyped-call]
    return out


def row(x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """x times the transpose of this rank's columns of a matrix, summed over ranks. sequence: of
    this rank's tokens only."""
    return leave(torch.nn.functional.linear(x, weight), axis, sequence)


def leave(partial: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """The sum of all ranks' partial results, of all tokens or of this rank's."""
    out: Tensor = _Leave.apply(partial, axis, sequence)  # type: ignore[no-untyped-call]
    return out


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, in place."""
    if axis.group is not None:
        dist.all_reduce(x, group=axis.group)
    return x


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' tokens, in the order of ranks."""
    if axis.group is None:
        return x
    out = x.new_empty(axis.size * x.numel())
    dist.all_gather_single(out, x.flatten(), group=axis.group)
    return torch.cat(list(out.view(axis.size, *x.shape)), TOKENS)


def scattered(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks of this rank's tokens."""
    if axis.group is None:
        return x
    parts = torch.stack(x.chunk(axis.size, TOKENS))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=axis.group)
    return added(received.flatten(1)).view(parts.shape[1:])


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.way = axis, sequence
        return torch.nn.functional.linear(gathered(x, axis) if sequence else x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        axis, sequence = ctx.way
        grad = grads[0]
        whole = gathered(x, axis) if sequence else x
        to_x = grad @ weight
        to_x = scattered(to_x, axis) if sequence else total(to_x, axis)
        return to_x, grad.flatten(0, -2).T @ whole.flatten(0, -2), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.way = axis, sequence
        return scattered(partial, axis) if sequence else total(partial.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        axis, sequence = ctx.way
        return (gathered(grads[0], axis) if sequence else grads[0]), None, None
