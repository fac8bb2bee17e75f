"""What crosses between the ranks that share each matrix (Megatron-LM, Shoeybi et al. 2019), and
between those that share the tokens outside of matrices as well (Korthikanti et al. 2022).

`column` goes into split matrices, `row` comes out of them. Without sequence parallelism one is free
forward and a sum backward, the other the reverse; with it they gather and scatter tokens, at the
same cost, and what lies between two layers is kept once instead of on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from train.parallel.collectives import added
from train.parallel.mesh import Axis

TOKENS = 1
"""The dimension that sequence parallelism cuts: x is (batch, tokens, hidden)."""


def column(x: Tensor, weights: Sequence[Tensor], axis: Axis, sequence: bool) -> Tensor:
    """x times the transposes of this rank's rows of matrices, side by side. sequence: x is this
    rank's tokens, and the product is of all; then x is gathered again on the way back instead of
    kept."""
    out: Tensor = _Column.apply(x, axis, sequence, *weights)  # type: ignore[no-untyped-call]
    return out


def row(x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """x times the transpose of this rank's columns of a matrix, summed over ranks. sequence: of
    this rank's tokens only."""
    return leave(functional.linear(x, weight), axis, sequence)


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
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)  # not their copy side by side
        ctx.way = axis, sequence
        return functional.linear(gathered(x, axis) if sequence else x, torch.cat(weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        axis, sequence = ctx.way
        grad = grads[0]
        whole = gathered(x, axis) if sequence else x
        to_x = grad @ torch.cat(weights)
        to_x = scattered(to_x, axis) if sequence else total(to_x, axis)
        to_weights = grad.flatten(0, -2).T @ whole.flatten(0, -2)
        return to_x, None, None, *torch.split(to_weights, [len(weight) for weight in weights])


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.way = axis, sequence
        return scattered(partial, axis) if sequence else total(partial.clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        axis, sequence = ctx.way
        return (gathered(grads[0], axis) if sequence else grads[0]), None, None
