"""Log-probabilities and several choices through hand-offs and kills: the same as undisturbed."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from serve.engine.draws import derived_seed
from serve.engine.sequence import Request, Sampling, TokenLogprob
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
