"""OpenAI's own client against the edge."""

import asyncio
from typing import Any

import openai
import pytest

from tests.edge.fakes import MODEL, ScriptedService, serving, spoken

TEXT = "The capital is Paris 🙂."
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client():
    with serving(ScriptedService(spoken(TEXT, cached_tokens=3))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(TEXT.encode()) + 1
    # The answer goes back in as history the way clients send it.
    history = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert client.chat.completions.create(model=MODEL, messages=history).choices


def test_chat_stream_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    *content, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in content) == TEXT
    assert content[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], len(TEXT.encode()) + 1)


def test_stop_strings_and_raw_completions(client):
    answer = client.completions.create(model=MODEL, prompt="x", stop=[" is", "Paris"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("The capital", "stop")
    stream = client.completions.create(model=MODEL, prompt="x", stop="🙂", stream=True)
    assert "".join(c.choices[0].text for c in stream) == "The capital is Paris "


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "sanderling"


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"top_q": 1})
    assert (unknown.value.param, unknown.value.code) == ("top_q", "unknown_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="z" * 500)
    assert long.value.code == "context_length_exceeded"


def test_a_failure_in_mid_stream_reaches_the_caller():
    service = ScriptedService([*spoken("Par")[:-1], RuntimeError("boom")])
    with serving(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert isinstance(stream, openai.Stream)
        seen = ""
        with pytest.raises(openai.APIError, match="failed"):
            for chunk in stream:
                seen += chunk.choices[0].delta.content or ""
        assert seen == "Par"


def test_thirty_two_streams_at_once():
    paced = [step for delta in spoken(TEXT) for step in (0.002, delta)]

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert isinstance(stream, openai.AsyncStream)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    with serving(ScriptedService(paced)) as url:
        assert asyncio.run(all_of_them(url)) == [TEXT] * 32
