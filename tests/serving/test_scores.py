"""Scores of a prompt through a whole service: the model's own log-softmax in every place, however
the prompt was cut, moved or found in a cache before."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from serve.engine.sequence import Delta, Request
from tests.serving.tiny import (
    decode,
    logits_of,
    replicas,
    request,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
    until,
)

PROMPT = [(13 * n + 5) % 256 for n in range(70)]


async def scored(service, one: Request) -> Delta:
    async with aclosing(service.ingress.generate(one)) as deltas:
        made: list[Delta] = [delta async for delta in deltas]
        assert len(made) == 1
        return made[0]


def assert_the_model_s(model, prompt: list[int], delta: Delta, top: int) -> None:
    assert (delta.token_ids, delta.finish) == ((), "stop")
    assert len(delta.scores) == len(prompt) - 1
    for place, entry in enumerate(delta.scores, start=1):
        logprobs = logits_of(model.decoder, prompt[:place])[0].double().log_softmax(0)
        assert entry.logprob == pytest.approx(float(logprobs[prompt[place]]), abs=1e-4)
        best = torch.sort(logprobs, descending=True)
        assert [token for token, _ in entry.top] == best.indices[:top].tolist()


@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_every_place_is_scored_cached_or_not(model, prefill):
    async def work():
        async with serving(settings(prefill=prefill, decode=1), model) as service:
            answer = request("a", PROMPT, 5, ignore_eos=True)
            for number in range(2):  # the second time the pages are in the cache
                asked = replace(request(f"s{number}", PROMPT, 1), score=2)
                assert_the_model_s(model, PROMPT, await scored(service, asked), 2)
            async with aclosing(service.ingress.generate(answer)) as deltas:
                made = [delta async for delta in deltas]
            assert made[0].cached_tokens > 0  # scoring leaves its pages to the answer
            assert [t for d in made for t in d.token_ids] == solo_tokens(model, answer)

    run(work())


def test_among_others_and_after_its_replica_was_killed(model):
    one = replace(request("s", PROMPT, 1), score=1)
    others = [request(f"o{n}", PROMPT[n : n + 20], 12, ignore_eos=True) for n in range(4)]

    async def tokens(service, other: Request) -> list[int]:
        async with aclosing(service.ingress.generate(other)) as deltas:
            return [token async for delta in deltas for token in delta.token_ids]

    async def work():
        async with serving(settings(prefill=0, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            streams = [asyncio.create_task(tokens(service, other)) for other in others]
            task = asyncio.create_task(scored(service, one))
            records = service.ingress._records
            await until(lambda: "s" in records and records["s"].replica_id is not None)
            victim = str(records["s"].replica_id)
            engine = decode(service, victim).loop.engine
            await until(lambda: bool(engine.scores._scored) or "s" not in records)
            service.launcher.kill(victim)
            assert_the_model_s(model, PROMPT, await task, 1)
            for other, stream in zip(others, streams, strict=True):
                assert await stream == solo_tokens(model, other)

    run(work())


def test_a_prompt_of_one_token_has_no_score(model):
    async def work():
        async with serving(settings(prefill=0, decode=1), model) as service:
            delta = await scored(service, replace(request("s", [7], 1), score=0))
            assert (delta.finish, delta.scores) == ("stop", ())

    run(work())
