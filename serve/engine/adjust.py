"""What a request asks to be done to its logits before a token is chosen: bias, penalties, bans.

In that order, as vLLM has it. Everything depends on the request and on the tokens so far, so a
sequence that goes on elsewhere is adjusted alike. Called by the sampler.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serve.engine.sequence import Sampling

if TYPE_CHECKING:
    from serve.engine.sampler import Draw


def adjusted(logits: Tensor, draws: Sequence["Draw"]) -> Tensor:
    """Logits [R, vocab] as each of R draws wants them; a copy if anything changes, since what a
    model made in inference mode may not be written to."""
    touched = [row for row, draw in enumerate(draws) if draw.banned or _asks(draw.sampling)]
    if not touched:
        return logits
    logits = logits.clone()
    for row in touched:
        _adjust(logits[row], draws[row])
    return logits


def _asks(sampling: Sampling) -> bool:
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias)
    return any(penalties) or sampling.repetition_penalty != 1.0


def _adjust(row: Tensor, draw: "Draw") -> None:
    """In place, on one row [vocab]. Ids that the model lacks cannot come up and are passed over."""
    sampling, vocab = draw.sampling, len(row)
    bias = [(token, value) for token, value in sampling.logit_bias if 0 <= token < vocab]
    if bias:
        tokens, values = zip(*bias, strict=True)
        row[list(tokens)] += torch.tensor(values, dtype=row.dtype, device=row.device)
    if sampling.repetition_penalty != 1.0:
        seen = _inside({*draw.prompt, *draw.output}, vocab)
        at = row[seen]
        factor = sampling.repetition_penalty
        row[seen] = torch.where(at > 0, at / factor, at * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        _penalise(row, draw.output, sampling)
    banned = _inside(draw.banned, vocab)
    row[banned] = -torch.inf


def _penalise(row: Tensor, output: Sequence[int], sampling: Sampling) -> None:
    counts = Counter(output)
    made = _inside(counts, len(row))
    times = torch.tensor([counts[token] for token in made], dtype=row.dtype, device=row.device)
    row[made] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _inside(tokens: "Sequence[int] | set[int] | Counter[int]", vocab: int) -> list[int]:
    return [token for token in tokens if 0 <= token < vocab]
