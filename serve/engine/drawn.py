"""Drawing many rows at once, where their logits are: what `sampler.sample_row` does, for a GPU.

Row by row on the host, a step of a hundred sequences would wait for their logits to be copied and
sorted there, which takes longer than the model. The same terms in the same order, in float64;
sums of another order may differ in their last bits, so that a draw within them of a boundary may
fall on its other side. Called by the sampler.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve.engine.draws import uniform

if TYPE_CHECKING:
    from serve.engine.sampler import Draw


def drawn(logits: Tensor, draws: Sequence["Draw"]) -> list[int]:
    """One token id for each row of logits [R, vocab], whose temperature is above 0."""
    terms = [draw.sampling for draw in draws]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double()
    scaled = (scaled - scaled.amax(1, keepdim=True)) / column([t.temperature for t in terms])
    scaled = _most_likely(scaled, [t.top_k for t in terms])
    probabilities = scaled.softmax(1)
    cut = [row for row, t in enumerate(terms) if t.top_p < 1.0]
    if cut:
        nucleus = _nucleus(probabilities[cut], column([terms[row].top_p for row in cut]))
        probabilities[cut] = nucleus
    if any(t.min_p > 0.0 for t in terms):
        least = column([t.min_p for t in terms]) * probabilities.amax(1, keepdim=True)
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    cumulative = probabilities.cumsum(1)
    points = column([uniform(draw.sampling.seed, draw.position) for draw in draws])
    chosen = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
    places = torch.arange(logits.shape[1], device=logits.device)
    last = torch.where(probabilities > 0, places, 0).amax(1)
    tokens: list[int] = torch.minimum(chosen, last).tolist()
    return tokens


def _most_likely(scaled: Tensor, top_k: Sequence[int]) -> Tensor:
    """Minus infinity below the k-th of a row, where it asks for that."""
    vocab = scaled.shape[1]
    asked = [k if 0 < k < vocab else vocab for k in top_k]
    rows = [row for row, k in enumerate(asked) if k < vocab]
    if not rows:
        return scaled
    best = scaled[rows].topk(max(asked[row] for row in rows)).values
    places = torch.tensor([asked[row] - 1 for row in rows], device=scaled.device)[:, None]
    least = torch.full((len(asked), 1), -torch.inf, dtype=scaled.dtype, device=scaled.device)
    least[rows] = best.gather(1, places)
    return scaled.masked_fill(scaled < least, -torch.inf)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero outside each row's smallest set of likeliest tokens whose mass reaches top_p [R, 1]."""
    ordered, index = probabilities.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    inside = before < top_p * ordered.sum(1, keepdim=True)
    inside[:, 0] = True
    kept = torch.zeros_like(inside).scatter(1, index, inside)
    return torch.where(kept, probabilities, 0.0)
