"""`python -m tests.clients.server PORT`: the HTTP edge over scripted tokens and vectors.

What clients and schema checkers are pointed at: every route, every refusal and both kinds of
answers are the real ones; only the tokens are made up, so that thousands of requests take seconds.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import uvicorn

from serve.engine.sequence import Delta, Request, TokenLogprob
from serve.http import EdgeSettings, build_app
from tests.edge.fakes import MODEL, tiny_text_model, tiny_tokenizer

WORDS = tiny_tokenizer().encode("hello world ")


class Words:
    """Says the same few words to everybody, up to the request's maximum."""

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        await asyncio.sleep(0)
        if request.embed:
            yield Delta((), "stop", embedding=(1.0, 0.0))
            return
        if request.score is not None:
            entry = TokenLogprob(-0.5, tuple((other, -1.0) for other in range(request.score)))
            yield Delta((), "stop", scores=(entry,) * (len(request.prompt) - 1))
            return
        count = min(request.limits.max_tokens, len(WORDS))
        for place, token in enumerate(WORDS[:count], start=1):
            finish = None if place < count else "length" if count < len(WORDS) else "stop"
            reported = request.logprobs
            top = tuple((other, -1.0 - other) for other in range(reported or 0))
            logprobs = () if reported is None else (TokenLogprob(-0.5, top),)
            yield Delta((token,), finish, logprobs=logprobs)  # type: ignore[arg-type]

    async def probe(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {"replicas": [], "metrics": {}}


def main(port: int) -> None:
    """Serve until killed."""
    text = tiny_text_model()
    roomy = replace(text, config=replace(text.config, context_tokens=1 << 24))
    app = build_app(Words(), roomy, EdgeSettings(MODEL))
    uvicorn.run(app, port=port, log_level="error")


if __name__ == "__main__":
    main(int(sys.argv[1]))
