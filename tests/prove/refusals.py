"""Proof rows of what the HTTP API refuses: statuses, and sentences that name what was wrong."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import httpx
import openai

from tests.live.service import FRANCE, MODEL, LiveService
from tests.prove.row import Row


class Refusal(NamedTuple):
    """A request that must be refused: path, body, status, and words that the sentence must hold."""

    what: str
    path: str
    body: dict[str, Any] | str
    status: int
    words: tuple[str, ...]


def _refusals() -> tuple[Refusal, ...]:
    chat, raw = "/v1/chat/completions", "/v1/completions"
    good = {"model": MODEL, "messages": FRANCE}
    long = {"model": MODEL, "prompt": [5] * 9000}
    wide = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 1_000_000}
    return (
        Refusal("unknown model", chat, {**good, "model": "gpt-9"}, 404, ("gpt-9", MODEL)),
        Refusal(
            "text for a number", chat, {**good, "max_tokens": "9"}, 400, ("max_tokens", "integer")
        ),
        Refusal("number for true", chat, {**good, "stream": 1}, 400, ("stream", "boolean")),
        Refusal("true for a number", chat, {**good, "seed": True}, 400, ("seed", "integer")),
        Refusal("out of bounds", chat, {**good, "temperature": 3}, 400, ("temperature", "2")),
        Refusal("missing field", chat, {"model": MODEL}, 400, ("messages",)),
        Refusal("wrong role", chat, {**good, "messages": [{"role": "x"}]}, 400, ("role", "user")),
        Refusal("unknown field", chat, {**good, "top_q": 1}, 400, ("top_q", "top_p")),
        Refusal("unsupported value", chat, {**good, "store": True}, 400, ("'store'", "false")),
        Refusal("over-long prompt", raw, long, 400, ("9000", "8192")),
        Refusal("over-long answer", raw, wide, 400, ("1000000", "8192")),
        Refusal("not JSON", chat, "{", 400, ("JSON",)),
        Refusal("wrong path", "/v1/chat", good, 404, ("/v1/chat",)),
    )


def rows(live: LiveService) -> Iterator[Row]:
    """One row per kind of wrong request: the status, and a sentence that names what was wrong."""
    for case in _refusals():
        body = {"content": case.body} if isinstance(case.body, str) else {"json": case.body}
        answer = httpx.post(live.url + case.path, timeout=60, **body)
        error = answer.json()["error"]
        text = error["message"]
        sentence = text.endswith(".") and set(error) == {"message", "type", "param", "code"}
        ok = answer.status_code == case.status and sentence and all(w in text for w in case.words)
        yield Row(
            f"refused: {case.what}",
            f"{case.status} naming {', '.join(case.words)}",
            f"{answer.status_code} {text}",
            ok,
        )
    error_types = (openai.NotFoundError, openai.BadRequestError)
    yield Row("openai client: errors", "its own types", *_raised(live, error_types))


def _raised(live: LiveService, wanted: tuple[type[openai.APIStatusError], ...]) -> tuple[str, bool]:
    """Which exceptions the client raises for an unknown model and for an unknown field."""
    create = live.client().chat.completions.create
    calls: tuple[Callable[[], object], ...] = (
        partial(create, model="gpt-9", messages=FRANCE),
        partial(create, model=MODEL, messages=FRANCE, extra_body={"top_q": 1}),
    )
    raised: list[type[Exception]] = []
    for call in calls:
        try:
            call()
        except openai.APIStatusError as error:
            raised.append(type(error))
    return ", ".join(kind.__name__ for kind in raised), tuple(raised) == wanted
