"""Tool calls: read the same however the text comes, shown in OpenAI's shape, forced when asked."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.calls import CallReader, Read
from serve.http import EdgeSettings, build_app
from serve.tools import Called, Tool, forced, with_tools, written
from tests.edge.fakes import CHATML, CONTEXT_TOKENS, MODEL, ScriptedService, spoken, tiny_text_model

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]</tool_call>'
NOT = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'


def read(pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[Any, ...]]]:
    reader = CallReader({"weather", "now"}, most, "chatcmpl-0123456789abcdef")
    everything = [*(reader.push(piece) for piece in pieces), reader.flush()]
    assert all(isinstance(one, Read) for one in everything)
    content = "".join(one.content for one in everything)
    return content, [tuple(call) for one in everything for call in one.calls]


def cut(text: str, places: list[int]) -> Iterator[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return (text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))


fragments = st.sampled_from(
    [ONE, TWO, NOT, "<tool_call>", "</tool_call>", "<tool", " ", "\n\n", "hi ", "<", "a < b", "{}"]
)


@given(st.lists(fragments, max_size=8).map("".join), st.lists(st.integers(0, 999)))
def test_what_is_read_does_not_depend_on_the_pieces(text, places):
    assert read(list(cut(text, places))) == read([text])


@given(st.lists(fragments, max_size=8).map("".join))
def test_nothing_but_calls_and_the_blanks_around_them_is_lost(text):
    content, calls = read([text])
    left = text
    for call in (ONE, TWO):
        left = left.replace(call, "")
    if NOT not in text and text.count("<tool_call>") == text.count(ONE) + text.count(TWO):
        assert "".join(content.split()) == "".join(left.split())
        assert len(calls) == text.count(ONE) + 2 * text.count(TWO)


def test_calls_are_numbered_and_what_is_none_stays_text():
    content, calls = read([f"Let me see. {ONE}\n{TWO}\n"])
    assert content == "Let me see."
    assert [(place, name) for place, _, name, _ in calls] == [
        (0, "weather"),
        (1, "now"),
        (2, "now"),
    ]
    assert json.loads(calls[0][3]) == {"city": "Köln"}
    assert len({identity for _, identity, _, _ in calls}) == 3
    assert read([f"x {NOT} y"]) == (f"x {NOT} y", [])
    assert read([ONE[:-3]]) == (ONE[:-3], [])
    content, calls = read([ONE + ONE], most=1)
    assert (content, len(calls)) == (ONE, 1)


def post(service: ScriptedService, **fields: object) -> httpx.Response:
    app = build_app(service, tiny_text_model(), EdgeSettings(MODEL))
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "tools": TOOLS,
        **fields,
    }

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's context is too short for a list of tools."""
    assert CONTEXT_TOKENS < 1000
    monkeypatch.setattr("tests.edge.fakes.CONTEXT_TOKENS", 4000)


@pytest.mark.parametrize("text", [ONE, f"Well. {ONE}\n{TWO}", "No call.", f"x {NOT}"])
def test_streamed_is_whole(text):
    whole = post(ScriptedService(spoken(text))).json()["choices"][0]
    answer = post(ScriptedService(spoken(text)), stream=True).text
    lines = [line for line in answer.split("\n\n") if line.startswith("data: {")]
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    content = "".join(c["delta"].get("content") or "" for c in choices)
    calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
    message = whole["message"]
    assert content == (message["content"] or "")
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    made = message.get("tool_calls", [])
    assert [call["function"] for call in calls] == [call["function"] for call in made]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    assert whole["finish_reason"] == ("tool_calls" if made else "stop")
    assert (message["content"] is None) == (text == ONE)


def test_the_model_hears_of_the_tools_unless_it_may_not_call():
    prompts = {}
    for choice in ("auto", "none"):
        service = ScriptedService(spoken(ONE))
        answer = post(service, tool_choice=choice).json()["choices"][0]
        text = tiny_text_model(CHATML).tokenizer.decode(service.requests[0].prompt)
        prompts[choice] = text
        assert ("tool_calls" in answer["message"]) == (choice == "auto")
    assert '"name": "weather"' in prompts["auto"] and "<tools>" not in prompts["none"]


def test_calls_and_results_of_the_past_are_in_the_prompt():
    called = {"id": "1", "type": "function"}
    called |= {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # type: ignore[dict-item]
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    service = ScriptedService(spoken("Sunny."))
    assert post(service, messages=history).status_code == 200
    text = tiny_text_model(CHATML).tokenizer.decode(service.requests[0].prompt)
    assert written([Called.model_validate(called)]) in text and "sunny" in text


def test_tools_join_the_system_message_there_is():
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    user = {"role": "user", "content": "a"}
    assert [m["role"] for m in with_tools([user], tools)] == ["system", "user"]
    [system, _] = with_tools([{"role": "system", "content": "Be kind."}, user], tools)
    assert system["content"].startswith("Be kind.\n\n") and "<tools>" in system["content"]
    assert with_tools([user], []) == [user]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_a_forced_call_is_a_grammar(choice):
    service = ScriptedService(spoken(ONE))
    assert post(service, tool_choice=choice).status_code == 200
    grammar = service.requests[0].grammar
    assert grammar is not None and grammar.kind == "ebnf"
    assert ("weather" in grammar.source) == (choice == "required")


@pytest.mark.parametrize("seed", range(12))
def test_a_forced_call_is_valid_whatever_the_model_thinks(seed):
    from serve.engine.sequence import Sequence
    from tests.grammar.test_structured import MODEL as RANDOM
    from tests.grammar.test_structured import asked, run

    chance = random.Random(seed)
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "on": {"type": "boolean"},
        },
        "required": chance.sample(["n", "on"], chance.randint(0, 2)),
        "additionalProperties": False,
    }
    tool = Tool.model_validate(
        {"type": "function", "function": {"name": "set", "parameters": schema}}
    )
    grammar = forced([tool], "required", parallel=False)
    assert grammar is not None
    output, finish = run(Sequence(asked(grammar, seed)))
    assert finish == "stop"
    reader = CallReader({"set"}, None, "a-1")
    [call] = reader.push(RANDOM.text.tokenizer.decode(output)).calls
    jsonschema.validate(json.loads(call.arguments), schema)
