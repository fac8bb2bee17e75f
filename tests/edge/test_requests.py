"""What a request may hold: every refusal is a 400 that names the field and what is accepted."""

import json
import typing

import pytest

from serve.errors import RequestError
from serve.openai import NEUTRAL, ChatRequest, CompletionRequest, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "g"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def refusal(kind: typing.Any, body: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    assert caught.value.message.endswith(".")
    return caught.value


def message(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [fields]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"\xff", None, "not valid JSON"),
        (b'{"model": "\\ud800"}', None, "not valid JSON"),
        (b"[" * 500, None, "not valid JSON"),
        (b"[]", None, "JSON object"),
        (b"null", None, "JSON object"),
        ({}, "model", "Missing"),
        ({"model": "m"}, "messages", "Missing"),
        ({**CHAT, "model": 7}, "model", "string"),
        ({**CHAT, "messages": []}, "messages", "at least 1"),
        ({**CHAT, "messages": "hi"}, "messages", "valid array"),
        ({**CHAT, "temprature": 1}, "temprature", "'temperature'"),
        ({**CHAT, "max_token": 1}, "max_token", "'max_tokens'"),
        (message(role="user", contents="a"), "messages[0].contents", "'content'"),
        (message(role="robot", content="a"), "messages[0].role", "'assistant'"),
        (message(role="user"), "messages[0].content", "needs content"),
        (message(role="assistant", content=None), "messages[0].content", "needs content"),
        (message(role="user", content=7), "messages[0].content", "text parts"),
        (message(role="user", content=[]), "messages[0].content", "text parts"),
        (message(role="user", content=[{"type": "text"}]), "messages[0].content[0]", "'text'"),
        (message(role="tool", content="a"), "messages[0].tool_call_id", "tool"),
        (
            message(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[0].content[0].type",
            "'image_url' are not supported",
        ),
        (
            message(role="user", content=[{"type": "text", "text": "a"}, {"type": "input_audio"}]),
            "messages[0].content[1].type",
            "'input_audio' are not supported",
        ),
        (
            message(role="assistant", content="a", tool_calls=[{"id": "1"}]),
            "messages[0].tool_calls[0].type",
            "Missing",
        ),
        (
            message(role="user", content="a", tool_calls=[CALL]),
            "messages[0].tool_calls",
            "'assistant'",
        ),
        ({**CHAT, "stream": "true"}, "stream", "boolean"),
        ({**CHAT, "stream": 1}, "stream", "boolean"),
        ({**CHAT, "stream": [True]}, "stream", "boolean"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options", "'stream' is true"),
        (
            {**CHAT, "stream": True, "stream_options": {"include_usag": True}},
            "stream_options.include_usag",
            "'include_usage'",
        ),
        ({**CHAT, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({**CHAT, "max_tokens": 1.0}, "max_tokens", "integer"),
        ({**CHAT, "max_tokens": "5"}, "max_tokens", "integer"),
        ({**CHAT, "max_tokens": True}, "max_tokens", "integer"),
        ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "one of the two"),
        ({**CHAT, "min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({**CHAT, "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({**CHAT, "temperature": "1"}, "temperature", "number"),
        ({**CHAT, "temperature": float("nan")}, "temperature", "finite"),
        ({**CHAT, "temperature": float("inf")}, "temperature", "finite"),
        ({**CHAT, "top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({**CHAT, "top_k": -2}, "top_k", "greater than or equal to -1"),
        ({**CHAT, "min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({**CHAT, "seed": 1 << 63}, "seed", "less than"),
        ({**CHAT, "stop": ""}, "stop", "1 to 1024 characters"),
        ({**CHAT, "stop": ["a"] * 17}, "stop", "at most 16"),
        ({**CHAT, "stop": ["a", 1]}, "stop", "list of strings"),
        ({**CHAT, "stop_token_ids": [1, "a"]}, "stop_token_ids[1]", "integer"),
        ({**CHAT, "n": 0}, "n", "greater than or equal to 1"),
        ({**CHAT, "n": 129}, "n", "less than or equal to 128"),
        ({**CHAT, "logprobs": 1}, "logprobs", "boolean"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs", "'logprobs' is true"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "equal to 20"),
        ({**CHAT, "priority": 101}, "priority", "less than or equal to 100"),
        ({**CHAT, "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({**CHAT, "frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({**CHAT, "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({**CHAT, "logit_bias": {"5": "1"}}, "logit_bias.5", "number"),
        ({**CHAT, "response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        (
            {**CHAT, "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "has",
        ),
        ({**CHAT, "structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools[0].function", "Missing"),
        ({**CHAT, "tools": [TOOL, TOOL]}, "tools", "two functions of one name"),
        ({**CHAT, "tool_choice": "required"}, "tool_choice", "'tools' has none"),
        ({**CHAT, "tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "not in 'tools'"),
        (
            {**CHAT, "tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format",
            "beside 'tools'",
        ),
        ({**CHAT, "store": True}, "store", "accepted: null or false"),
        ({**CHAT, "modalities": ["text", "audio"]}, "modalities", '["text"]'),
    ],
)
def test_chat_refusals(body, param, words):
    error = refusal(ChatRequest, body)
    assert error.param == param
    assert words in error.message
    if param is not None:
        assert f"'{param}'" in error.message
    shape = error.body()["error"]
    assert set(shape) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "list of token ids"),
        ({"prompt": 5}, "prompt", "list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts"),
        ({"prompt": [[1], [2]]}, "prompt", "2 prompts"),
        ({"prompt": [1, "b"]}, "prompt", "integers"),
        ({"prompt": [True]}, "prompt", "list of token ids"),
        ({"prompt": [1.5]}, "prompt", "list of token ids"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"n": 3, "best_of": 2}, "best_of", "at least 'n'"),
        ({"best_of": 2, "stream": True}, "best_of", "'stream'"),
        ({"suffix": "z"}, "suffix", "not supported"),
        ({"messages": []}, "messages", "nearest"),
    ],
)
def test_completion_refusals(fields, param, words):
    error = refusal(CompletionRequest, {**COMPLETION, **fields})
    assert error.param == param
    assert words in error.message


def test_every_neutral_value_is_accepted():
    for kind, base in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        for name in NEUTRAL.keys() & kind.model_fields.keys():
            for value in NEUTRAL[name]:
                parse(kind, json.dumps({**base, name: value}).encode())


def test_null_stands_for_the_default():
    required = {"model", "messages", "prompt"}
    for kind, base in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        for name in kind.model_fields.keys() - required:
            parse(kind, json.dumps({**base, name: None}).encode())


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("a", "a"), (["a"], "a"), ([1, 2], (1, 2)), ([[3]], (3,)), ("", ""), ([], ())],
)
def test_prompts(prompt, read):
    assert parse(
        CompletionRequest, json.dumps({**COMPLETION, "prompt": prompt}).encode()
    ).prompt == (read)


def test_messages_for_the_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
    }
    read = [m.for_template() for m in parse(ChatRequest, json.dumps(body).encode()).messages]
    assert read == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb", "name": "ann"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
