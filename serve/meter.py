"""What is asked of a service and how it answers, counted as requests pass: what an autoscaler needs
to know, without anything of their content."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from cluster.clock import Clock
from serve.engine.sequence import Delta, Request
from serve.service import Service

FIRST_GUESS_TOKENS = 64  # of an answer, before one has ended
MEMORY = 0.9  # what the length of past answers weighs against the next one's


@dataclass
class Taken:
    """Since the last `take`. prompt_tokens, answer_tokens: asked for, answers as long as they are
    expected to get. ttft_s, tpot_s: of requests that had a first token, or ended."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


class Meter:
    """A Service that passes everything on and counts."""

    def __init__(self, inner: Service, clock: Clock) -> None:
        self.inner = inner
        self.clock = clock
        self._answer_tokens = float(FIRST_GUESS_TOKENS)
        self._taken = Taken()

    def take(self) -> Taken:
        """What was counted since the last call."""
        taken, self._taken = self._taken, Taken()
        return taken

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """See Service."""
        begun_s = self.clock.now_s()
        expected = min(request.limits.max_tokens, round(self._answer_tokens))
        self._taken.prompt_tokens += len(request.prompt)
        self._taken.answer_tokens += expected
        first_s, tokens = None, 0
        async with contextlib.aclosing(self.inner.generate(request)) as deltas:
            async for delta in deltas:
                tokens += len(delta.token_ids)
                if first_s is None and tokens:
                    first_s = self.clock.now_s()
                    self._taken.ttft_s.append(first_s - begun_s)
                yield delta
        if first_s is not None and tokens > 1:
            self._taken.tpot_s.append((self.clock.now_s() - first_s) / (tokens - 1))
        self._answer_tokens = MEMORY * self._answer_tokens + (1 - MEMORY) * tokens

    async def probe(self) -> bool:
        """See Service."""
        return await self.inner.probe()

    async def status(self) -> dict[str, Any]:
        """See Service."""
        return await self.inner.status()


def p90(values: list[float]) -> float | None:
    """The 90th percentile; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=10, method="inclusive")[-1]
