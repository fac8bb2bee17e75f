"""n, best_of and echo: choices keep apart, streamed or whole, and end together."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace

import httpx
import pytest

from cluster.clock import WallClock
from serve.answers import ChatFormat, CompletionFormat, Head
from serve.choices import DONE, Choices, frames, whole
from serve.engine.sequence import Delta, Limits, Request, Sampling, TokenLogprob
from serve.errors import RequestError
from serve.http import EdgeSettings, build_app
from serve.kv.prefix import CacheKey
from serve.observe import EdgeMetrics, RequestMetrics
from serve.stream import Generation
from tests.edge.fakes import MODEL, ScriptedService, Step, spoken, tiny_text_model, tiny_tokenizer


def generation(script: list[Step]) -> Generation:
    request = Request("r", (1, 2, 3), Sampling(), Limits(50), CacheKey("", "", ""))
    metrics = RequestMetrics(EdgeMetrics("m", 100, WallClock()), 3, 50)
    return Generation(ScriptedService(script), request, tiny_tokenizer(), metrics, 5.0)


def paused(text: str, pause_s: float) -> list[Step]:
    """A delta, a pause, and so on."""
    return [step for delta in spoken(text) for step in (delta, pause_s)]


def test_choices_streamed_are_those_of_the_whole_answer():
    texts = ["hello 🙂", "wé", "", "a longer one than the others"]

    async def work() -> None:
        form = ChatFormat(Head("id", 5, "m", True))
        choices = Choices([generation(paused(t, n / 1000)) for n, t in enumerate(texts)])
        await choices.start()
        answer = (await whole(choices, form, len(texts))).model_dump()
        assert [c["message"]["content"] for c in answer["choices"]] == texts
        assert [c["index"] for c in answer["choices"]] == list(range(len(texts)))
        again = Choices([generation(paused(t, n / 1000)) for n, t in enumerate(texts)])
        await again.start()
        *events, done = [event async for event in frames(again, form, True)]
        assert done == DONE
        *chunks, usage = [json.loads(event[6:]) for event in events]
        read, ends = [""] * len(texts), [0] * len(texts)
        for [choice] in (chunk["choices"] for chunk in chunks):
            assert not ends[choice["index"]], "a chunk after the end of its choice"
            read[choice["index"]] += choice["delta"].get("content", "")
            ends[choice["index"]] += choice["finish_reason"] is not None
        assert read == texts and ends == [1] * len(texts)
        made = sum(len(text.encode()) + 1 for text in texts)
        assert usage["usage"]["completion_tokens"] == made == answer["usage"]["completion_tokens"]
        assert usage["usage"]["prompt_tokens"] == 3

    asyncio.run(work())


def test_the_likeliest_are_shown_best_first():
    def scripted(text: str, logprob: float) -> Generation:
        entry = (TokenLogprob(logprob),)
        ids = list(text.encode())
        deltas: list[Step] = [Delta((token,), logprobs=entry) for token in ids[:-1]]
        return generation([*deltas, Delta((ids[-1],), "length", logprobs=entry)])

    async def work() -> None:
        # A sum would prefer the short one.
        choices = Choices(
            [scripted("bad", -3.0), scripted("long but likely", -1.0), scripted("ok", -2.0)]
        )
        await choices.start()
        answer = await whole(choices, CompletionFormat(Head("id", 5, "m", False)), 2, False)
        shown = answer.model_dump()["choices"]
        assert [(c["index"], c["text"]) for c in shown] == [(0, "long but likely"), (1, "ok")]
        assert shown[0]["logprobs"] is None

    asyncio.run(work())


@pytest.mark.parametrize("streamed", [False, True])
def test_one_choice_that_fails_ends_the_answer(streamed):
    broken: list[Step] = [Delta((104,)), 0.01, RequestError(500, "server_error", None, "No.")]

    async def work() -> None:
        choices = Choices([generation(paused("hello", 0.02)), generation(broken)])
        await choices.start()
        form = ChatFormat(Head("id", 5, "m", False))
        if streamed:
            events = [event async for event in frames(choices, form, True)]
            assert json.loads(events[-1][6:])["error"]["message"] == "No."
        else:
            with pytest.raises(RequestError, match="No."):
                await whole(choices, form, 2)
        await choices.aclose()

    asyncio.run(work())


def test_a_refusal_of_any_choice_is_a_refusal_of_the_request():
    async def work() -> None:
        refused: list[Step] = [RequestError(429, "rate_limit_error", None, "Later.")]
        choices = Choices([generation([0.5, *spoken("a")]), generation(refused)])
        with pytest.raises(RequestError, match="Later."):
            await choices.start()
        await choices.aclose()

    asyncio.run(work())


def ask(service: ScriptedService, **fields: object) -> httpx.Response:
    app = build_app(service, tiny_text_model(), EdgeSettings(MODEL))
    body = {"model": MODEL, "prompt": "he", "max_tokens": 20, **fields}

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return await client.post("/v1/completions", json=body)

    return asyncio.run(work())


def test_over_http_choices_share_a_group_and_differ_in_seed():
    service = ScriptedService(spoken("llo"))
    answer = ask(service, n=3, seed=9).json()
    assert [choice["text"] for choice in answer["choices"]] == ["llo"] * 3
    assert {one.group for one in service.requests} == {answer["id"]}
    assert service.requests[0].sampling.seed == 9
    assert len({one.sampling.seed for one in service.requests}) == 3
    assert len({one.request_id for one in service.requests}) == 3


def test_echo_comes_before_the_text_streamed_or_whole():
    assert ask(ScriptedService(spoken("llo")), echo=True).json()["choices"][0]["text"] == "hello"
    ids = ask(ScriptedService(spoken("llo")), echo=True, prompt=[104, 101]).json()
    assert ids["choices"][0]["text"] == "hello"
    lines = ask(ScriptedService(spoken("llo")), echo=True, stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"


class Scoring(ScriptedService):
    """Also scores a prompt, as the engine does: every place but the first."""

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        if request.score is None:
            async for delta in super().generate(request):
                yield delta
            return
        self.requests.append(request)
        top = tuple((97 + n, -1.0 - n) for n in range(request.score))
        count = len(request.prompt) - 1
        yield Delta((), "stop", scores=tuple(TokenLogprob(-0.5 - n, top) for n in range(count)))


def with_logprobs(text: str) -> list[Step]:
    return [replace(delta, logprobs=(TokenLogprob(-0.25),)) for delta in spoken(text)]


def test_echo_with_logprobs_reports_the_prompt_s_tokens_and_then_the_answer_s():
    service = Scoring(with_logprobs("llo"))
    answer = ask(service, echo=True, logprobs=2, prompt=[104, 105, 106]).json()
    [choice] = answer["choices"]
    assert choice["text"] == "hijllo"
    reported = choice["logprobs"]
    assert reported["tokens"] == list("hijllo")
    assert reported["token_logprobs"] == [None, -0.5, -1.5, -0.25, -0.25, -0.25]
    assert reported["top_logprobs"][:2] == [None, {"b": -2.0, "a": -1.0}]
    assert reported["text_offset"] == list(range(6))
    assert [one.score for one in service.requests] == [2, None]
    assert answer["usage"]["prompt_tokens"] == 3


def test_streamed_echo_reports_the_same_logprobs():
    fields: dict[str, object] = {"echo": True, "logprobs": 1, "prompt": [104, 105, 106], "n": 2}
    whole = ask(Scoring(with_logprobs("llo")), **fields).json()["choices"]
    lines = ask(Scoring(with_logprobs("llo")), stream=True, **fields).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index, choice in enumerate(whole):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for p in mine if p["logprobs"] for v in p["logprobs"][name]] == values


def test_a_prompt_that_cannot_be_scored_is_an_error_of_the_request():
    class Failing(ScriptedService):
        async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
            yield Delta((), "error", error="The request failed on its replica: no pages.")

    answer = ask(Failing(), echo=True, logprobs=0)
    assert answer.status_code == 500
    assert "no pages" in answer.json()["error"]["message"]


def test_the_choices_of_a_prompt_count_it_once():
    app = build_app(ScriptedService(spoken("ab")), tiny_text_model(), EdgeSettings(MODEL))

    async def work() -> str:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            body = {"model": MODEL, "prompt": "hex", "n": 3}
            await client.post("/v1/completions", json=body)
            return (await client.get("/metrics")).text

    text = asyncio.run(work())
    assert 'vllm:prompt_tokens_total{model_name="tiny"} 2.0' in text  # "he" and "x"
    assert 'vllm:generation_tokens_total{model_name="tiny"} 9.0' in text
