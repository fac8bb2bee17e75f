"""Deltas to text: independent of how tokens are grouped, and equal streamed or whole."""

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.clock import WallClock
from serve.answers import ChatFormat, CompletionFormat, Head
from serve.choices import DONE, Choices, frames, whole
from serve.engine.sequence import Delta, Limits, Request, Sampling, TokenLogprob
from serve.errors import RequestError
from serve.kv.prefix import CacheKey
from serve.observe import EdgeMetrics, RequestMetrics
from serve.spell import ShownToken
from serve.stream import Generation, Transcript
from tests.edge.fakes import ScriptedService, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_ids[0]

# Text whose characters are one to four byte tokens, with merges and stray bytes in between.
tokens = st.lists(
    st.one_of(
        st.text("helo w🙂é中", max_size=4).map(lambda text: list(text.encode())),
        st.sampled_from([256, 257, 258, 259]).map(lambda merge: [merge]),
        st.integers(0, 255).map(lambda byte: [byte]),
    ),
    max_size=12,
).map(lambda lists: [token for run in lists for token in run])
stops = st.lists(st.text("helo w🙂", min_size=1, max_size=3), max_size=3).map(tuple)


def grouped(ids: list[int], cuts: list[int], last: Delta) -> list[Delta]:
    """The tokens as deltas that end at `cuts`, then `last`."""
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    spans = zip(bounds, bounds[1:], strict=False)
    return [*(Delta(tuple(ids[start:stop])) for start, stop in spans), last]


def shown(deltas: list[Delta], limits: Limits) -> tuple[str, str | None, int]:
    transcript, text = Transcript(TOKENIZER, limits), ""
    for delta in deltas:
        piece = transcript.take(delta)
        text += piece.text
        if piece.finish is not None:
            return text, piece.finish, transcript.tokens
    raise AssertionError("no finish")


@given(tokens, st.lists(st.integers(1, 60)))
def test_text_is_the_decoding_of_all_tokens(ids, cuts):
    text, finish, count = shown(grouped(ids, cuts, Delta((END,), "stop")), Limits(100))
    assert (text, finish, count) == (TOKENIZER.decode(ids), "stop", len(ids) + 1)


@given(tokens, stops, st.integers(0, 6), st.lists(st.integers(1, 60)))
def test_text_and_finish_do_not_depend_on_the_grouping(ids, strings, min_tokens, cuts):
    limits = Limits(100, min_tokens=min_tokens, stop=strings)
    last = Delta((), "length")
    one_by_one = shown(grouped(ids, list(range(len(ids))), last), limits)
    assert shown(grouped(ids, cuts, last), limits)[:2] == one_by_one[:2]


@given(tokens, stops)
def test_text_is_cut_at_the_first_stop_string(ids, strings):
    text, _, _ = shown(grouped(ids, [], Delta((), "length")), Limits(100, stop=strings))
    full = TOKENIZER.decode(ids)
    ends = [(full.find(s) + len(s), full.find(s)) for s in strings if s in full]
    assert text == (full[: min(ends)[1]] if ends else full)


def test_an_ordinary_stop_token_is_counted_and_not_shown():
    period = ord(".")
    deltas = [Delta((104, 105)), Delta((period,), "stop")]
    assert shown(deltas, Limits(10, stop_token_ids=(period,))) == ("hi", "stop", 3)
    # The same token at the length limit is text.
    deltas = [Delta((104, 105)), Delta((period,), "length")]
    assert shown(deltas, Limits(10, stop_token_ids=(7,))) == ("hi.", "length", 3)


def test_a_stop_string_wins_over_a_stop_token_of_the_same_token():
    last = Delta((ord("."),), "stop", stop="i.")
    limits = Limits(10, stop_token_ids=(ord("."),), stop=("i.",))
    assert shown([Delta((104, 105)), last], limits) == ("h", "stop", 3)


def test_stop_strings_before_min_tokens_do_not_count():
    deltas = [*(Delta((byte,)) for byte in b"abab"), Delta((ord("c"),), "length")]
    assert shown(deltas, Limits(5, stop=("b",)))[0] == "a"
    assert shown(deltas, Limits(5, min_tokens=2, stop=("b",)))[0] == "a"
    assert shown(deltas, Limits(5, min_tokens=3, stop=("b",)))[0] == "aba"
    assert shown(deltas, Limits(5, min_tokens=5, stop=("b",)))[0] == "ababc"


def test_half_a_character_at_the_end_is_shown_as_replacement():
    assert shown([Delta(tuple("é".encode()[:1]), "length")], Limits(5))[0] == "\ufffd"


def generation(
    script: list[Delta | Exception | float],
    limits: Limits,
    service: ScriptedService | None = None,
) -> Generation:
    prompt = (1, 2, 3)
    request = Request("id-1", prompt, Sampling(), limits, CacheKey("", "", ""))
    metrics = RequestMetrics(EdgeMetrics("m", 100, WallClock()), len(prompt), limits.max_tokens)
    return Generation(service or ScriptedService(script), request, TOKENIZER, metrics, 5.0)


async def streamed(script: list[Delta | Exception | float], limits: Limits) -> list[bytes]:
    run = Choices([generation(script, limits)])
    await run.start()
    form = ChatFormat(Head("id-1", 5, "m", True))
    events = [event async for event in frames(run, form, True)]
    await run.aclose()
    return events


@given(tokens, stops, st.booleans(), st.lists(st.integers(1, 60)))
def test_streamed_text_equals_whole_text(ids, strings, ended, cuts):
    last = Delta((END,), "stop", None, 2) if ended else Delta((), "length", None, 2)
    deltas: list[Delta | Exception | float] = [*grouped(ids, cuts, last)]
    limits = Limits(100, stop=strings)

    async def both() -> None:
        run = Choices([generation(deltas, limits)])
        await run.start()
        answer = await whole(run, ChatFormat(Head("id-1", 5, "m", False)))
        await run.aclose()
        read = answer.model_dump()
        *events, done = await streamed(deltas, limits)
        assert done == DONE
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
        *content, usage = chunks
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in content]
        assert "".join(texts) == read["choices"][0]["message"]["content"]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in content]
        assert reasons == [None] * (len(content) - 1) + [read["choices"][0]["finish_reason"]]
        assert (usage["choices"], usage["usage"]) == ([], read["usage"])
        assert all(chunk["usage"] is None for chunk in content)

    asyncio.run(both())


def test_a_failure_after_the_first_token_is_an_event_and_the_end():
    script: list[Delta | Exception | float] = [Delta((104,)), RuntimeError("a secret path")]
    *_, last = asyncio.run(streamed(script, Limits(9)))
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ([RequestError(503, "server_error", None, "No replica.")], 503, "No replica."),
        ([Delta((), "error", error="The engine stopped.")], 500, "The engine stopped."),
        ([Delta((), "abort")], 500, "aborted"),
        ([RuntimeError("secret")], 500, "failed"),
        ([], 500, "without a finish reason"),
    ],
)
def test_a_failure_before_the_first_token_is_raised(script, status, words):
    with pytest.raises(RequestError, match=words) as caught:
        asyncio.run(streamed(script, Limits(9)))
    assert caught.value.status == status


class SlowToClose(ScriptedService):
    """Counts the closes that got to their end."""

    closes = 0

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        try:
            yield Delta((104,))
        finally:
            await asyncio.sleep(0.01)
            self.closes += 1


def test_a_close_is_waited_for_happens_once_and_survives_cancellation():
    async def run(cancel: bool) -> int:
        service = SlowToClose()
        opened = generation([], Limits(9), service)
        await opened.start()
        closing = asyncio.create_task(opened.aclose())
        await asyncio.sleep(0)
        if cancel:
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
        await opened.aclose()
        return service.closes

    assert asyncio.run(run(cancel=False)) == 1
    assert asyncio.run(run(cancel=True)) == 1


def test_usage_fields_are_absent_unless_asked_for():
    for form in (ChatFormat, CompletionFormat):
        assert "usage" not in form(Head("i", 5, "m", False)).chunk("a", None).model_dump()
        assert form(Head("i", 5, "m", True)).chunk("a", None).model_dump()["usage"] is None


def reported(ids: list[int]) -> tuple[TokenLogprob, ...]:
    """Log-probabilities that tell tokens apart."""
    return tuple(TokenLogprob(-token / 100, ((token, -token / 100), (1, -9.0))) for token in ids)


@given(tokens, stops, st.lists(st.integers(1, 60)))
def test_every_shown_token_is_reported_once_however_deltas_are_grouped(ids, strings, cuts):
    limits = Limits(100, stop=strings)
    last = Delta((END,), "stop", logprobs=reported([END]))
    transcript, seen = Transcript(TOKENIZER, limits), list[ShownToken]()
    for delta in grouped(ids, cuts, last):
        piece = transcript.take(replace(delta, logprobs=reported(list(delta.token_ids))))
        seen += piece.tokens
        if piece.finish is not None:
            break
    assert [round(-(s.token.logprob or 0.0) * 100) for s in seen] == ids[: len(seen)]
    assert seen or not ids
    raw = b"".join(s.token.raw for s in seen)
    if not strings:
        assert raw.decode("utf-8", "replace") == TOKENIZER.decode(ids)
    offsets = [0, *itertools.accumulate(len(s.token.text) for s in seen)]
    assert [s.offset for s in seen] == offsets[: len(seen)]


@pytest.mark.parametrize("make", [ChatFormat, CompletionFormat])
def test_logprobs_streamed_are_those_of_the_whole(make):
    said = "wé🙂 lo".encode()
    deltas: list[Delta | Exception | float] = [Delta((t,), logprobs=reported([t])) for t in said]
    deltas.append(Delta((END,), "stop", logprobs=reported([END])))
    form = make(Head("id", 0, "tiny", False))

    async def both() -> tuple[list[bytes], dict[str, Any]]:
        streamed, complete = (Choices([generation(deltas, Limits(100))]) for _ in range(2))
        for one in (streamed, complete):
            await one.start()
        chunks = [frame async for frame in frames(streamed, form, False)]
        return chunks, json.loads((await whole(complete, form)).model_dump_json())

    chunks, answer = asyncio.run(both())
    parts = [json.loads(c[6:])["choices"][0]["logprobs"] for c in chunks if c != DONE]
    wanted = answer["choices"][0]["logprobs"]
    for field in wanted:
        if wanted[field] is not None:
            assert sum((p[field] for p in parts if p), []) == wanted[field]
    assert len(wanted["content" if make is ChatFormat else "tokens"]) == len(said)
