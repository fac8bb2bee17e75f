"""Embedding, head and loss whose rows of the vocabulary lie on several ranks; logits are whole
nowhere (Megatron-LM, Shoeybi et al. 2019)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.mesh import Axis
from train.parallel.tensor_exchange import leave, total


def rows_of(vocabulary: int, axis: Axis) -> slice:
    """The rows of a rank: consecutive, the last ranks' perhaps fewer."""
    each = -(-vocabulary // axis.size)
    return slice(min(axis.rank * each, vocabulary), min((axis.rank + 1) * each, vocabulary))


def embed(tokens: Tensor, weight: Tensor, first: int, axis: Axis, sequence: bool) -> Tensor:
    """tokens (batch, tokens) of the whole vocabulary, weight this rank's rows, from `first` on; out
    (batch, tokens, hidden), of this rank's tokens if `sequence`."""
    local = tokens - first
    ours = (local >= 0) & (local < len(weight))
    found = weight[torch.where(ours, local, 0)] * ours.unsqueeze(-1).to(weight.dtype)
    return leave(found, axis, sequence)


def cross_entropy(logits: Tensor, targets: Tensor, first: int, axis: Axis) -> Tensor:
    """Summed, in nats. logits (n, this rank's rows), from row `first` on; targets (n,) of the whole
    vocabulary. In float32 at least."""
    wide = logits.float() if logits.dtype != torch.float64 else logits
    out: Tensor = _CrossEntropy.apply(wide, targets, first, axis)  # type: ignore[no-untyped-call]
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, axis: Axis) -> Tensor:
        most = logits.amax(-1)
        if axis.group is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=axis.group)
        exponents = (logits - most.unsqueeze(-1)).exp()
        local = targets - first
        ours = (local >= 0) & (local < logits.shape[-1])
        at = torch.where(ours, local, 0).unsqueeze(-1)
        own = (logits.gather(-1, at).squeeze(-1) - most) * ours.to(logits.dtype)
        summed = total(torch.stack([exponents.sum(-1), own]), axis)
        ctx.save_for_backward(exponents.div_(summed[0].unsqueeze(-1)), at, ours)
        return (summed[0].log() - summed[1]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, at, ours = ctx.saved_tensors
        to_logits = softmax.scatter_add(-1, at, -ours.to(softmax.dtype).unsqueeze(-1))
        return to_logits.mul_(grads[0]), None, None, None
