"""Tokens with their log-probabilities, spelled out for a reader. Used by stream.py; pure."""

from typing import NamedTuple

from models.detokenize import token_bytes
from models.tokenizer import Tokenizer
from serve.engine.sequence import TokenLogprob


class Spelled(NamedTuple):
    """One token: its text (U+FFFD for half a character), its bytes, its log-probability, which the
    first token of a prompt has not."""

    text: str
    raw: bytes
    logprob: float | None


class ShownToken(NamedTuple):
    """A token of an answer and the most likely ones in its place. offset: characters before it,
    all tokens' texts counted one by one."""

    token: Spelled
    top: tuple[Spelled, ...]
    offset: int


def spell(
    tokenizer: Tokenizer, token_id: int, entry: TokenLogprob | None, offset: int
) -> ShownToken:
    """One token for a reader; without an entry it has no log-probability."""
    if entry is None:
        return ShownToken(_spelled(tokenizer, token_id, None), (), offset)
    top = tuple(_spelled(tokenizer, other, logprob) for other, logprob in entry.top)
    return ShownToken(_spelled(tokenizer, token_id, entry.logprob), top, offset)


def _spelled(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> Spelled:
    raw = token_bytes(tokenizer, token_id)
    return Spelled(raw.decode("utf-8", "replace"), raw, logprob)
