"""Log-probabilities and several choices through hand-offs and kills: the same as undisturbed."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from serve.engine.draws import derived_seed
from serve.engine.sequence import Request, Sampling, TokenLogprob
from serve.errors import RequestError
from serve.grammar.terms import Grammar
from tests.serving.tiny import (
    collect,
    decode,
    first_token,
    logits_of,
    replicas,
    request,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
)

PROMPT = [(11 * n + 3) % 256 for n in range(45)]


async def reported(service, one: Request) -> list[tuple[int, TokenLogprob]]:
    made: list[tuple[int, TokenLogprob]] = []
    async with aclosing(service.ingress.generate(one)) as deltas:
        async for delta in deltas:
            assert len(delta.token_ids) == len(delta.logprobs)
            made += zip(delta.token_ids, delta.logprobs, strict=True)
    return made


def assert_the_model_s(model, one: Request, made: list[tuple[int, TokenLogprob]]) -> None:
    assert [token for token, _ in made] == solo_tokens(model, one)
    for n, (token, entry) in enumerate(made):
        before = [*one.prompt, *(t for t, _ in made[:n])]
        logprobs = logits_of(model.decoder, before)[0].double().log_softmax(0)
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        best = torch.sort(logprobs, descending=True)
        assert [t for t, _ in entry.top] == best.indices[:3].tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "killed"])
@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_every_token_comes_with_its_logprob_once(model, prefill, killed):
    one = request("a", PROMPT, 25, Sampling(1.0, seed=5, frequency_penalty=0.3), ignore_eos=True)
    one = replace(one, logprobs=3)

    async def work():
        async with serving(settings(prefill=prefill, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            stream = asyncio.create_task(reported(service, one))
            await first_token(service, "a")
            if killed:
                victim = service.ingress._records["a"].replica_id
                assert victim is not None
                service.launcher.kill(victim)
            assert_the_model_s(model, one, await stream)
            assert service.ingress.resumed == killed

    run(work())


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "killed"])
@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_choices_share_a_prompt_and_survive(model, prefill, killed):
    first = request("n", PROMPT, 20, Sampling(1.0, seed=8), ignore_eos=True)
    choices = [
        replace(
            first,
            request_id=f"n-{index}",
            group="n",
            sampling=replace(first.sampling, seed=derived_seed(8, index)),
        )
        for index in range(4)
    ]

    async def work():
        async with serving(settings(prefill=prefill, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            streams = [asyncio.create_task(collect(service, one)) for one in choices]
            await first_token(service, "n-0")
            there = {record.replica_id for record in service.ingress._records.values()}
            assert len(there) == 1, "siblings are apart"
            if killed:
                service.launcher.kill(str(there.pop()))
            for one, stream in zip(choices, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            if not killed:
                computed = sum(
                    decode(service, name).loop.engine.prompt_tokens
                    for name in replicas(service, "decode")
                )
                assert computed == len(PROMPT) + len(choices) - 1

    run(work())


def test_no_prefix_is_shared_between_tenants(model):
    mine = request("a", PROMPT, 4, ignore_eos=True)
    theirs = replace(mine, cache_key=mine.cache_key._replace(salt="tenant:other"))

    async def cached(service, one: Request) -> int:
        async with aclosing(service.ingress.generate(one)) as deltas:
            counts: list[int] = [delta.cached_tokens async for delta in deltas]
            return counts[-1]

    async def work():
        async with serving(settings(prefill=1), model) as service:
            assert await cached(service, mine) == 0
            assert await cached(service, replace(mine, request_id="b")) > 0
            hits = [decode(service, n).loop.engine.stats() for n in replicas(service, "decode")]
            before = sum(s.prefix_hits_tokens for s in hits)
            assert await cached(service, replace(theirs, request_id="c")) == 0
            hits = [decode(service, n).loop.engine.stats() for n in replicas(service, "decode")]
            assert sum(s.prefix_hits_tokens for s in hits) == before
            assert await cached(service, replace(theirs, request_id="d")) > 0

    run(work())


def test_a_small_tenant_does_not_wait_behind_a_flood(model):
    chosen = settings(prefill=0, budget_tokens=16, max_running=1)

    async def work():
        async with serving(chosen, model) as service:
            slow(decode(service))
            ended: list[str] = []

            async def one(asked: Request) -> None:
                await collect(service, asked)
                ended.append(asked.request_id)

            flood = [
                replace(request(f"flood {n}", [n, *PROMPT], 3, ignore_eos=True), priority=0)
                for n in range(12)
            ]
            tasks = [asyncio.create_task(one(asked)) for asked in flood]
            await first_token(service, "flood 0")
            small = request("small", [200, *PROMPT[:20]], 3, ignore_eos=True)
            small = replace(small, cache_key=small.cache_key._replace(salt="tenant:small"))
            await asyncio.create_task(one(small))
            assert len(ended) <= 5, "it stood behind the flood"
            await asyncio.gather(*tasks)

    run(work())


def test_over_the_cap_is_a_429_and_nothing_is_kept(model):
    base = settings(prefill=0, max_running=1)
    chosen = base.model_validate({**base.model_dump(), "admission": {"max_queued_tokens": 100}})

    async def work():
        async with serving(chosen, model) as service:
            slow(decode(service))
            asked = [request(f"r{n}", [n, *PROMPT], 8, ignore_eos=True) for n in range(8)]
            answers = await asyncio.gather(
                *(collect(service, one) for one in asked), return_exceptions=True
            )
            refused = [a for a in answers if isinstance(a, RequestError)]
            assert {error.status for error in refused} == {429} and len(refused) < len(asked)
            for one, answer in zip(asked, answers, strict=True):
                assert isinstance(answer, RequestError) or answer == solo_tokens(model, one)
            assert (service.ingress.backlog.tokens, service.ingress.backlog.requests) == (0, 0)
            assert service.ingress.backlog.refused == len(refused)

    run(work())


SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "ü"]}},
    },
    "minItems": 2,
    "maxItems": 3,
}


@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_an_answer_keeps_its_form_when_its_replica_is_killed(model, prefill):
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    one = replace(request("g", PROMPT, 60, Sampling(1.0, seed=4)), grammar=grammar)

    async def answer(kill: bool) -> list[int]:
        async with serving(settings(prefill=prefill, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            stream = asyncio.create_task(collect(service, one))
            await first_token(service, "g")
            if kill:
                service.launcher.kill(str(service.ingress._records["g"].replica_id))
            tokens = await stream
            assert service.ingress.resumed == kill
            return tokens

    async def work():
        undisturbed = await answer(kill=False)
        assert await answer(kill=True) == undisturbed
        text = model.text.tokenizer.decode(undisturbed)
        assert text.startswith("[") and len(undisturbed) > 5

    run(work())
