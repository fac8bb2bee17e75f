"""One load for every server: streamed /v1/completions over prompts of text, timed at the client.

Nothing in here knows which program answers, but for the fields of Endpoint.extra. A stream that
was cut, an answer shorter than was asked for and a refusal are errors. The client runs on the same
cores as the servers and costs each of them alike. Called by tests/peers/measures.py.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from serve.arrivals import Arrival
from serve.bench import Slo

TIMEOUT_S = 300.0
# One token each for SmolLM2, with the blank before it and without.
WORDS = (
    *("and", "the", "that", "for", "with", "are", "from", "this", "can", "have", "not", "their"),
    *("more", "one", "which", "also", "how", "use", "may", "new", "time", "people", "other"),
    *("water", "work", "first", "day", "world", "year", "food", "life", "school", "number"),
)


@dataclass(frozen=True)
class Endpoint:
    """A server that answers below `url`/v1, the model's name there, and fields it needs besides
    OpenAI's to answer in full length."""

    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)


class Question(NamedTuple):
    """What is sent, how many tokens are wanted, and when: seconds from the beginning."""

    prompt: str
    max_tokens: int
    at_s: float = 0.0


class Answer(NamedTuple):
    """Seconds from when it was due to the first and to the last text, and tokens by the server's
    count (0 of the prompt: the server does not say)."""

    first_s: float
    last_s: float
    prompt_tokens: int
    completion_tokens: int

    def within(self, slo: Slo) -> bool:
        """First token in time, and the gaps on average."""
        gap_s = (self.last_s - self.first_s) / max(self.completion_tokens - 1, 1)
        return self.first_s <= slo.first_s and gap_s <= slo.gap_s


class LoadError(RuntimeError):
    """A server did not answer one question as it was asked; the sentence says how."""


def words(tokens: int, seed: str) -> str:
    """A prompt of so many tokens; other seeds share no beginning worth keeping."""
    return " ".join(random.Random(seed).choices(WORDS, k=tokens))


def ask(endpoint: Endpoint, questions: Sequence[Question]) -> list[Answer]:
    """All answers, in order; each question is sent when it is due. LoadError if one fails."""
    return asyncio.run(_ask(endpoint, questions))


def tokens_per_s(endpoint: Endpoint, questions: Sequence[Question]) -> float:
    """Output tokens per second of questions that are sent at once, their prompts included."""
    started_s = time.perf_counter()
    answers = ask(endpoint, questions)
    return sum(a.completion_tokens for a in answers) / (time.perf_counter() - started_s)


def goodput_per_s(endpoint: Endpoint, questions: Sequence[Question], slo: Slo) -> float:
    """Answers within the promise per second, from the first question to the last answer."""
    started_s = time.perf_counter()
    answers = ask(endpoint, questions)
    return sum(a.within(slo) for a in answers) / (time.perf_counter() - started_s)


def replayed(arrivals: Iterable[Arrival], seed: str) -> list[Question]:
    """Questions of a trace's lengths and times, made of words."""
    return [
        Question(words(arrival.prompt_tokens, f"{seed}-{number}"), arrival.max_tokens, arrival.at_s)
        for number, arrival in enumerate(arrivals)
    ]


async def _ask(endpoint: Endpoint, questions: Sequence[Question]) -> list[Answer]:
    limits = httpx.Limits(max_connections=len(questions))
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        started_s = time.perf_counter()
        asked = (_answer(client, endpoint, question, started_s) for question in questions)
        return await asyncio.gather(*asked)


async def _answer(
    client: httpx.AsyncClient, endpoint: Endpoint, question: Question, started_s: float
) -> Answer:
    due_s = started_s + question.at_s
    await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
    texts_s: list[float] = []
    finish: str | None = None
    usage: dict[str, Any] = {}
    async for event in _events(client, endpoint, question):
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            finish = choice.get("finish_reason") or finish
            # The end stands in for a text when no token could be seen.
            if choice.get("text") or (finish and not texts_s):
                texts_s.append(time.perf_counter() - due_s)
    # Who does not count says by "length" that all were made.
    tokens = usage.get("completion_tokens", question.max_tokens if finish == "length" else 0)
    if finish is None or tokens != question.max_tokens:
        end = f"{tokens} of {question.max_tokens} tokens and finish_reason {finish}"
        raise LoadError(f"{endpoint.url} ended its stream after {end}.")
    return Answer(texts_s[0], texts_s[-1], usage.get("prompt_tokens", 0), tokens)


async def _events(
    client: httpx.AsyncClient, endpoint: Endpoint, question: Question
) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of one completion."""
    body = {
        **{"model": endpoint.model, "prompt": question.prompt, "max_tokens": question.max_tokens},
        **{"temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
        **endpoint.extra,
    }
    try:
        path = f"{endpoint.url}/v1/completions"
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise LoadError(f"{endpoint.url} refused: {response.status_code} {said[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if event.get("error"):
                        raise LoadError(f"{endpoint.url} failed: {event['error']}")
                    yield event
    except httpx.HTTPError as error:
        raise LoadError(f"{endpoint.url} cut its stream: {error!r}") from error
