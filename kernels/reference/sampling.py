"""Choosing the next token: temperature, then the top k, then the top p (Holtzman et al., 2019).

Chance comes in as numbers between 0 and 1, so that a seed of the caller's decides.
"""

import torch


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """logits [R, V], temperature, top_p [R], top_k [R] int, uniform [R] float32 -> ids [R] int64.

    Tokens are ordered by value, of equals the lower id first. Kept are the first top_k of them (all
    if it is 0 or less, or above V), and of those the shortest prefix whose share of their
    probability is at least top_p (all if it is 1 or more; always one). The token drawn is the first
    by id at which the cumulated probability of the kept ones exceeds `uniform` (0 <= uniform < 1)
    of their sum. Temperature 0 takes the largest logit. A row has one finite logit at least; -inf
    is a token never drawn.
    """
    exact = logits.double()
    greedy = temperature == 0
    scaled = exact / torch.where(greedy, 1, temperature.double())[:, None]
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    chances = values.masked_fill(places >= limit, -torch.inf).softmax(-1)
    before = chances.cumsum(-1) - chances
    outside = (before >= top_p.double()[:, None]) & (top_p < 1)[:, None] & (places > 0)
    kept = chances.masked_fill(outside, 0)
    by_id = torch.zeros_like(kept).scatter(-1, order, kept)
    reached = by_id.cumsum(-1)
    target = uniform.double()[:, None] * reached[:, -1:]
    # A float32 below 1 times the sum is below the sum in float64, so there is such a token.
    drawn = (reached > target).int().argmax(-1)
    return torch.where(greedy, order[:, 0], drawn)
