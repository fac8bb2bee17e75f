"""Embeddings through a whole service: the states behind the logits, however they were computed."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from serve.engine.sequence import Delta, Request
from tests.serving.tiny import logits_of, request, run, serving, settings


async def embedded(service, one: Request) -> Delta:
    async with aclosing(service.ingress.generate(one)) as deltas:
        made: list[Delta] = [delta async for delta in deltas]
        return made[-1]


def wanted(model, prompt: list[int]) -> torch.Tensor:
    """The last state, solved from the logits that it makes: the head is known, and one to one."""
    logits = logits_of(model.decoder, prompt)[0].double()
    head = model.decoder.embed if model.decoder.head is None else model.decoder.head
    state = torch.linalg.lstsq(head.weight.double(), logits[:, None]).solution[:, 0]
    unit: torch.Tensor = state / state.norm()
    return unit


@pytest.mark.parametrize("prefill", [0, 1], ids=["together", "apart"])
def test_the_last_state_at_length_one(model, prefill):
    prompts = [[(7 * n + 5 * k) % 256 for n in range(3 + 20 * k)] for k in range(5)]
    prompts.append(prompts[-1])  # the second time from the cache

    async def work():
        async with serving(settings(prefill=prefill, decode=2), model) as service:
            for number, prompt in enumerate(prompts):
                asked = replace(request(f"e{number}", prompt, 1), embed=True)
                delta = await embedded(service, asked)
                assert (delta.token_ids, delta.finish) == ((), "stop")
                made = torch.tensor(delta.embedding, dtype=torch.float64)
                assert float(made.norm()) == pytest.approx(1, abs=1e-5)
                assert torch.allclose(made, wanted(model, prompt), atol=1e-4)
                assert (delta.cached_tokens > 0) == (number == len(prompts) - 1)

    run(work())


def test_many_at_once_are_each_their_own(model):
    prompts = [[(n * k + k) % 256 for n in range(2 + k)] for k in range(1, 30)]

    async def work():
        async with serving(settings(prefill=0, decode=1), model) as service:
            asked = [replace(request(f"m{n}", p, 1), embed=True) for n, p in enumerate(prompts)]
            deltas = await asyncio.gather(*(embedded(service, one) for one in asked))
        for prompt, delta in zip(prompts, deltas, strict=True):
            made = torch.tensor(delta.embedding, dtype=torch.float64)
            assert torch.allclose(made, wanted(model, prompt), atol=1e-4)

    run(work())
