"""Which experts see which tokens, and the order in which rows travel to them. None is dropped."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Routing(NamedTuple):
    """experts, weights (tokens, top_k): chosen experts and what their answers count, summing to 1;
    balance: the loss that is least, 1, when all experts are chosen alike (Fedus et al. 2021)."""

    experts: Tensor
    weights: Tensor
    balance: Tensor


def route(x: Tensor, router: Tensor, top_k: int) -> Routing:
    """x (tokens, hidden), router (experts, hidden); probabilities in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    probabilities = functional.linear(x.to(wide), router.to(wide)).softmax(-1)
    weights, experts = probabilities.topk(top_k, dim=-1)
    chosen = functional.one_hot(experts, len(router)).to(wide).sum(1).mean(0) / top_k
    balance = len(router) * (chosen * probabilities.mean(0)).sum()
    weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights.to(x.dtype), balance)


class Sorted(NamedTuple):
    """Rows grouped by expert. source (rows,): the token that each is a copy of; choice (rows,): its
    place among tokens x top_k; counts (experts,): rows of each expert."""

    source: Tensor
    choice: Tensor
    counts: Tensor


def sort_by_expert(chosen: Tensor, experts: int) -> Sorted:
    """chosen: (tokens, top_k). Within an expert rows stay in the order of tokens."""
    flat = chosen.flatten()
    choice = flat.argsort(stable=True)
    return Sorted(choice // chosen.shape[1], choice, torch.bincount(flat, minlength=experts))


def combine(rows: Tensor, routing: Routing, order: Sorted) -> Tensor:
    """(tokens, hidden): each token's answers, weighted and added up in the order of its choices."""
    tokens, top_k = routing.experts.shape
    placed = put_back(rows, order.choice)
    return (placed.view(tokens, top_k, -1) * routing.weights.unsqueeze(-1)).sum(1)


def take(rows: Tensor, order: Tensor) -> Tensor:
    """rows[order], of a permutation: keeps the order for its backward pass and nothing else."""
    out: Tensor = _Permuted.apply(rows, order, True)  # type: ignore[no-untyped-call]
    return out


def put_back(rows: Tensor, order: Tensor) -> Tensor:
    """The inverse of `take`: row n goes to place order[n]."""
    out: Tensor = _Permuted.apply(rows, order, False)  # type: ignore[no-untyped-call]
    return out


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, taken: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.taken = taken
        return rows[order] if taken else torch.empty_like(rows).index_copy_(0, order, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        (grad,) = grads
        return _Permuted.forward(ctx, grad, order, not ctx.taken), None, None
