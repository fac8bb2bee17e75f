"""From logits to one token per row: greedy, or temperature, top-k, top-p and min-p in that order,
after what `adjust` does to them.

A row's token depends on its logits and on (seed, position) alone, never on its neighbours. The draw
inverts the cumulative distribution in vocabulary order, so that rounding noise in the logits can
change a token only when the draw falls within that noise of a boundary. Called by Engine.step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.adjust import adjusted
from serve.engine.drawn import drawn
from serve.engine.draws import uniform
from serve.engine.sequence import Sampling


@dataclass(frozen=True)
class Draw:
    """What one row asks: its sampling terms, the position of the token to make, tokens it may not
    be (end tokens before min_tokens), the tokens so far, which penalties look at, and the mask of
    those that its grammar allows."""

    sampling: Sampling
    position: int
    banned: tuple[int, ...] = ()
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    allowed: npt.NDArray[np.bool_] | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id per row of `logits` [R, vocab] float32; `draws` has R entries."""
    assert logits.shape[0] == len(draws), (logits.shape, len(draws))
    logits = adjusted(restricted(logits, draws), draws)
    tokens = _largest(logits)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature != 0]
    if rows and not logits.is_cpu:
        made = drawn(logits[rows], [draws[row] for row in rows])
    else:
        made = [sample_row(logits[row], draws[row]) for row in rows]
    for row, token in zip(rows, made, strict=True):
        tokens[row] = token
    return tokens


def _largest(logits: Tensor) -> list[int]:
    """The first largest of each row. NumPy on a CPU: torch would share the rows among threads,
    which have to wait for cores on which the kernels' own are still spinning."""
    if logits.is_cpu:
        best: list[int] = logits.numpy().argmax(axis=1).tolist()
        return best
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    return chosen


def restricted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The same logits, minus infinity wherever a row's mask says no, or is too short to say. A row
    that allows nothing is left as it is: its grammar has failed, and its token is not used."""
    rows = [
        row for row, draw in enumerate(draws) if draw.allowed is not None and draw.allowed.any()
    ]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        mask = torch.zeros(logits.shape[1], dtype=torch.bool)
        given = torch.from_numpy(draws[row].allowed)[: logits.shape[1]]
        mask[: len(given)] = given
        logits[row].masked_fill_(~mask.to(logits.device), -torch.inf)
    return logits


def sample_row(logits: Tensor, draw: Draw) -> int:
    """A token of one row [vocab] by the draw's terms."""
    token_ids, probabilities = candidates(logits, draw.sampling)
    cumulative = probabilities.cumsum(0)
    point = uniform(draw.sampling.seed, draw.position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, point, right=True))
    return int(token_ids[min(index, len(token_ids) - 1)])


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that survive the filters, in vocabulary order, and their probabilities (float64,
    not renormalised): (ids [C], probabilities [C])."""
    # The largest becomes 0, so that no temperature, however low, makes an infinity of it.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    kept = torch.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        kept = (scaled >= scaled.topk(sampling.top_k).values[-1]).nonzero().squeeze(-1)
    probabilities = scaled[kept].softmax(0)
    if sampling.top_p < 1.0:
        mask = _nucleus(probabilities, sampling.top_p)
        kept, probabilities = kept[mask], probabilities[mask]
    if sampling.min_p > 0.0:
        mask = probabilities >= sampling.min_p * probabilities.max()
        kept, probabilities = kept[mask], probabilities[mask]
    return kept, probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Mask of the smallest set of most likely entries whose mass reaches top_p (never empty)."""
    ordered, index = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    mask = torch.zeros_like(probabilities, dtype=torch.bool)
    mask[index[before < top_p * ordered.sum()]] = True
    mask[index[0]] = True
    return mask
