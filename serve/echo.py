"""What an answer that echoes its prompt begins with: the text and, where they were asked for, the
log-probabilities of the prompt's own tokens.

The prompt is scored by a request of its own, which ends before its first token; so it is routed,
queued and resumed as any other, and leaves its pages for the answer. Called by http.py.
"""

from contextlib import aclosing
from dataclasses import dataclass, replace

from models.tokenizer import Tokenizer
from serve.engine.sequence import Limits, Request, TokenLogprob
from serve.errors import RequestError
from serve.service import Service
from serve.spell import ShownToken, spell


@dataclass(frozen=True)
class Echo:
    """The prompt's text, and its tokens where they are reported; nothing by default."""

    text: str = ""
    tokens: tuple[ShownToken, ...] = ()


async def scored(service: Service, request: Request, tokenizer: Tokenizer, text: str) -> Echo:
    """The echo of a request that reports log-probabilities. RequestError when scoring fails."""
    asked = replace(
        request,
        request_id=f"{request.request_id}-prompt",
        limits=Limits(1),
        grammar=None,
        logprobs=None,
        score=request.logprobs,
    )
    async with aclosing(service.generate(asked)) as deltas:
        last = [delta async for delta in deltas][-1]
    if last.finish != "stop":
        sentence = last.error or "The service ended the request without scoring its prompt."
        raise RequestError(500, "server_error", None, sentence, "internal_error")
    return Echo(text, tuple(_spelled(tokenizer, request.prompt, last.scores)))


def _spelled(
    tokenizer: Tokenizer, prompt: tuple[int, ...], scores: tuple[TokenLogprob, ...]
) -> list[ShownToken]:
    """The first token has nothing before it that could make it likely: no log-probability."""
    shown, offset = [], 0
    for token, entry in zip(prompt, (None, *scores), strict=True):
        shown.append(spell(tokenizer, token, entry, offset))
        offset += len(shown[-1].token.text)
    return shown
