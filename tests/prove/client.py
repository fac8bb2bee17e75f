"""Proof rows at the client: OpenAI's own library and raw HTTP against a running service."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import openai

from models.load import load_text
from tests.live.service import FRANCE, MODEL, LiveService, busy, idle, service, wait_for
from tests.prove import refusals
from tests.prove.attempt import attempt
from tests.prove.row import Row

STREAMS = 32
STREAM_TOKENS = 24
CACHED_PROMPT_TOKENS = 1000
PAIRS = 3
FREE_S = 10.0
LEFT_TOKENS = 1000
WORDS = ("sand", "tide", "wave", "shell", "gull", "dune", "salt", "wind", "kelp", "crab", "foam")


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured, on one service; about five minutes."""
    with service() as live:
        yield from attempt("chat, stream and usage", lambda: chat(live))
        yield from attempt("completions and models", lambda: others(live))
        yield from attempt("refusals", lambda: refusals.rows(live))
        yield from attempt("32 streams at once", lambda: streams(live))
        yield from attempt("client gone", lambda: clients_gone(live))
        yield from attempt("TTFT with a cached prefix", lambda: first_token(live))


def chat(live: LiveService) -> Iterator[Row]:
    """A whole answer and a streamed one, twice: the second time the prompt is in the cache."""
    create = live.client().chat.completions.create
    whole = create(model=MODEL, messages=FRANCE, temperature=0)
    text = whole.choices[0].message.content or ""
    yield Row("asked for France's capital", "says Paris", repr(text), "Paris" in text)
    chunks = create(
        model=MODEL,
        messages=FRANCE,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *content, last = list(chunks)
    streamed = "".join(c.choices[0].delta.content or "" for c in content)
    pieces = sum(bool(c.choices[0].delta.content) for c in content)
    ended = content[-1].choices[0].finish_reason
    same = streamed == text and ended == whole.choices[0].finish_reason == "stop"
    measured = f"{'same' if same else 'different'} text in {pieces} pieces, ended by {ended}"
    yield Row("openai client: chat, streamed = whole", "same text", measured, same and pieces > 3)
    assert whole.usage and last.usage
    yield _usage(live, whole.usage.model_dump(), last.usage.model_dump())


def _usage(live: LiveService, first: dict[str, Any], second: dict[str, Any]) -> Row:
    """Usage against our own tokenizer's count, and cached tokens on the second request."""
    text = load_text(MODEL)
    assert text.chat_template is not None
    prompt = len(text.tokenizer.encode(text.chat_template.render(FRANCE)))
    counts = [
        (u["prompt_tokens"], u["total_tokens"] - u["completion_tokens"]) for u in (first, second)
    ]
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in (first, second)]
    right = counts == [(prompt, prompt)] * 2 and first["completion_tokens"] > 3
    right &= first["completion_tokens"] == second["completion_tokens"]
    measured = f"{counts[1][0]} prompt tokens, cached {cached[0]} then {cached[1]}"
    target = f"{prompt} prompt tokens, > 0 cached the second time"
    ok = right and cached[0] == 0 and 0 < cached[1] < prompt
    return Row("openai client: usage", target, measured, ok)


def others(live: LiveService) -> Iterator[Row]:
    """Completions of raw text, a stop string, the list of models."""
    client = live.client()
    prompt = "One, two, three, four,"
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
    chunks = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stream=True
    )
    text = whole.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    cut = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=0, stop="six"
    )
    right = streamed == text and "five" in text and cut.choices[0].text == text.split("six")[0]
    right &= (cut.choices[0].finish_reason, whole.choices[0].finish_reason) == ("stop", "length")
    yield Row("openai client: completions, stream, stop", "same text", repr(text), right)
    names = [model.id for model in client.models.list()]
    found = client.models.retrieve(MODEL).id
    yield Row("openai client: models", MODEL, ", ".join(names), names == [found] == [MODEL])


def streams(live: LiveService) -> Row:
    """Seeded streams all at once, then each of them alone: every text has to be the same."""
    together = asyncio.run(_ask_all(live, at_once=STREAMS))
    alone = asyncio.run(_ask_all(live, at_once=1))
    differ = sum(a != b for a, b in zip(together, alone, strict=True))
    different = len(set(together))
    measured = f"{len(together)} complete, {different} different texts, {differ} unlike alone"
    ok = len(together) == STREAMS and differ == 0 and different > STREAMS / 2
    return Row(f"{STREAMS} streams at once, each as when alone", "0 differ", measured, ok)


async def _ask_all(live: LiveService, at_once: int) -> list[str]:
    slots = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        return await asyncio.gather(*(_ask(client, n, slots) for n in range(STREAMS)))


async def _ask(client: openai.AsyncOpenAI, number: int, slots: asyncio.Semaphore) -> str:
    """The text of stream `number`; short and long prompts, greedy and seeded. It has to end."""
    messages: list[Any] = [
        {"role": "user", "content": f"{number}: {_words(5 + 6 * number, number)}"}
    ]
    async with slots:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=STREAM_TOKENS,
            temperature=0.9 * (number % 3 > 0),
            seed=number,
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def _words(count: int, seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(count))


def clients_gone(live: LiveService) -> Iterator[Row]:
    """A client that leaves during a stream, while it waits, and before its first token."""
    long = {"messages": FRANCE, "max_tokens": LEFT_TOKENS, "ignore_eos": True}
    cases = (
        ("a stream", {**long, "stream": True}),
        ("a whole answer", long),
        ("a long prompt", {**long, "messages": [{"role": "user", "content": _words(1800, 5)}]}),
    )
    for what, body in cases:
        yield from attempt(f"client gone during {what}", partial(_leave, live, what, body))


def _leave(live: LiveService, what: str, body: dict[str, Any]) -> Row:
    """Close the connection as soon as the request is seen at work; its pages must come back."""
    wait_for(lambda: idle(live), "an idle service before")
    before = _generated(live)
    pages = asyncio.run(_send_and_leave(live, {"model": MODEL, **body}))
    waited_s = wait_for(lambda: idle(live), "pages free after the client left", 600)
    tokens = _generated(live) - before
    measured = (
        f"{pages} pages busy, free after {waited_s:.1f} s, {tokens} of {LEFT_TOKENS} tokens made"
    )
    ok = pages > 0 and waited_s <= FREE_S and tokens < LEFT_TOKENS / 2
    return Row(f"client gone during {what}", f"pages free in {FREE_S:g} s", measured, ok)


async def _send_and_leave(live: LiveService, body: dict[str, Any]) -> int:
    """Pages that were busy for the request when its connection was closed."""
    async with httpx.AsyncClient(timeout=60) as client:
        url = f"{live.url}/v1/chat/completions"
        sending = asyncio.create_task(client.post(url, json=body))
        pages = 0
        while not pages and not sending.done():
            await asyncio.sleep(0.05)
            pages = busy(await asyncio.to_thread(live.states))["pages"]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return pages


def _generated(live: LiveService) -> int:
    return sum(int(s["stats"]["generated_tokens"]) for s in live.states("decode").values())


def first_token(live: LiveService) -> Row:
    """Time to the first token of prompts that were never seen, and of the same ones again."""
    tokenizer = load_text(MODEL).tokenizer
    fresh, cached = [], []
    for pair in range(PAIRS):
        words = f"Pair {pair}. {_words(2 * CACHED_PROMPT_TOKENS, pair + 11)}"
        prompt = tokenizer.encode(words)[:CACHED_PROMPT_TOKENS]
        assert len(prompt) == CACHED_PROMPT_TOKENS
        fresh.append(_first_token_s(live, prompt, expect_cached=False))
        cached.append(_first_token_s(live, prompt, expect_cached=True))
    ratio = statistics.median(b / a for a, b in zip(fresh, cached, strict=True))
    measured = (
        f"{ratio:.3f} ({statistics.median(cached) * 1e3:.0f} ms cached, "
        f"{statistics.median(fresh) * 1e3:.0f} ms fresh)"
    )
    name = f"TTFT of a cached {CACHED_PROMPT_TOKENS:,}-token prompt"
    return Row(name, "<= 0.2 x uncached", measured, ratio <= 0.2)


def _first_token_s(live: LiveService, prompt: list[int], expect_cached: bool) -> float:
    """Seconds from sending to the first event; the usage must say cached, or not."""
    started_s = time.perf_counter()
    first_s, cached = 0.0, -1
    stream = live.client().completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=2,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        first_s = first_s or time.perf_counter() - started_s
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
    wanted = range(len(prompt) - 32, len(prompt)) if expect_cached else range(1)
    assert cached in wanted, f"{cached} tokens were cached"
    return first_s
