"""Log-probabilities of the tokens that were chosen, as the model itself sees them.

Taken from the raw logits, so they say what the model thinks, not what temperature, penalties or
bans made of it. Called by Engine.step for rows that ask.
"""

from collections.abc import Sequence

from torch import Tensor

from serve.engine.sequence import TokenLogprob


def report(
    logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """One entry per row of `logits` [R, vocab]; wanted[r] most likely tokens, None: no entry."""
    assert logits.shape[0] == len(tokens) == len(wanted), (logits.shape, len(tokens), len(wanted))
    return [
        None if count is None else _row(logits[row], token, count)
        for row, (token, count) in enumerate(zip(tokens, wanted, strict=True))
    ]


def _row(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.double().log_softmax(0)
    best = logprobs.topk(min(count, len(logprobs)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(float(logprobs[token]), tuple(top))
