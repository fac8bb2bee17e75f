"""Collectives that gradients flow back through: rows to whom they are for, weights to everyone."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def send_rows(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """rows (sum of sent, width), those for rank 0 first; out: (sum of received, width), those from
    rank 0 first. The gradient takes the way back."""
    out: Tensor = _SendRows.apply(rows, tuple(sent), tuple(received), group)  # type: ignore[no-untyped-call]
    return out


def gather_weights(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, ...): everybody's. The gradient of each share is the sum of all ranks', at home."""
    out: Tensor = _Gather.apply(weight, group)  # type: ignore[no-untyped-call]
    return out


def gather_from(weight: Tensor, peers: range, group: dist.ProcessGroup) -> Tensor:
    """(peers, ...): those of some ranks of the group, this one among them; all name the same, and
    every rank of the group calls it. The gradient of each share is the sum of its peers'."""
    counts = [int(rank in peers) for rank in range(group.size())]
    rows = weight.reshape(1, -1).expand(len(peers), -1)
    return send_rows(rows, counts, counts, group).view(len(peers), *weight.shape)


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """counts (ranks, n) int64: what is for each rank; out: what each rank has for this one."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.way = sent, received, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _SendRows.forward(ctx, grads[0], received, sent, group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = weight.new_empty(group.size() * weight.numel())
        dist.all_gather_single(out, weight.flatten(), group=group)
        return out.view(group.size(), *weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shares = torch.empty_like(grads[0])
        dist.all_to_all_single(shares, grads[0].contiguous(), group=ctx.group)
        return shares.sum(0), None
