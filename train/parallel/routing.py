"""Which experts see which tokens, and the order in which rows travel to them. None is dropped."""

from typing import NamedTuple

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
    placed = torch.empty_like(rows).index_copy(0, order.choice, rows)
    return (placed.view(tokens, top_k, -1) * routing.weights.unsqueeze(-1)).sum(1)
