"""Seeded requests of every kind that a kill must not change, and their answers, comparable.

A case is a body for chat completions; `ask` streams it over raw HTTP and puts the chunks together:
text, tool calls, log-probabilities and the reason of the end, for each choice.
"""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.live.service import MODEL, LiveService

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
        "coast": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["city", "people", "coast", "words"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 24},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CASES: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 0.8, "max_tokens": 48, "ignore_eos": True},
    "logprobs": {
        **{"temperature": 0, "max_tokens": 32, "ignore_eos": True},
        **{"logprobs": True, "top_logprobs": 3},
    },
    "n=2": {"temperature": 0.9, "max_tokens": 24, "ignore_eos": True, "n": 2},
    "json_schema": {"temperature": 0.7, "max_tokens": 160, "response_format": FORM},
    "tools": {
        **{"temperature": 0.7, "max_tokens": 96},
        **{"tools": [WEATHER], "tool_choice": "required"},
    },
    "penalties": {
        **{"temperature": 1, "max_tokens": 40, "ignore_eos": True},
        **{"frequency_penalty": 0.6, "presence_penalty": 0.2, "logit_bias": {"28": -100}},
    },
}
Answer = dict[int, dict[str, Any]]


def body(case: str, seed: int, question: str) -> dict[str, Any]:
    """The streamed chat completion of a case."""
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "seed": seed, "stream": True, **CASES[case]}


def ask(
    live: LiveService, sent: dict[str, Any], *, at: int = 0, act: Callable[[], None] | None = None
) -> Answer:
    """The answer; `act` is called after chunk number `at`, or at the end of a shorter one.

    RuntimeError with the server's words for an error status or event, httpx.HTTPError for a
    connection that broke, RuntimeError for a stream without its end.
    """
    made: Answer = {}
    ended = acted = False
    with (
        httpx.Client(timeout=300) as client,
        client.stream("POST", f"{live.url}/v1/chat/completions", json=sent) as response,
    ):
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
        for number, data in enumerate(_data(response)):
            if act is not None and not acted and (number >= at or data == "[DONE]"):
                acted = True
                act()
            if data == "[DONE]":
                ended = True
                break
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                _add(made.setdefault(choice["index"], _empty()), choice)
    if not ended or any(choice["finish"] is None for choice in made.values()):
        raise RuntimeError("the stream ended without its end")
    return made


def same(one: Answer, other: Answer) -> bool:
    """Equal in text, calls, ends and tokens; log-probabilities to 1e-3."""
    if set(one) != set(other):
        return False
    return all(_same(one[index], other[index]) for index in one)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    plain = ("text", "finish", "calls", "tokens")
    if any(one[name] != other[name] for name in plain):
        return False
    pairs = zip(one["logprobs"], other["logprobs"], strict=True)
    return all(abs(a - b) <= 1e-3 for a, b in pairs)


def _empty() -> dict[str, Any]:
    return {"text": "", "finish": None, "calls": [], "tokens": [], "logprobs": []}


def _add(made: dict[str, Any], choice: dict[str, Any]) -> None:
    made["text"] += choice["delta"].get("content") or ""
    for call in choice["delta"].get("tool_calls") or []:
        made["calls"].append([call["function"]["name"], call["function"]["arguments"]])
    for entry in (choice.get("logprobs") or {}).get("content") or []:
        made["tokens"].append(entry["token"])
        made["logprobs"].append(entry["logprob"])
    made["finish"] = choice["finish_reason"] or made["finish"]


def _data(response: httpx.Response) -> Any:
    lines = (line for line in response.iter_lines() if line.startswith("data: "))
    return (line.removeprefix("data: ") for line in lines)
