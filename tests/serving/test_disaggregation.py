"""Prefill and decode apart or together: the same tokens, and exactly the bytes they need."""

import asyncio

import pytest

from serve.engine.sequence import Sampling
from tests.serving.tiny import (
    TOKEN_BYTES,
    collect,
    decode,
    mixed_requests,
    prefill,
    replicas,
    request,
    run,
    serving,
    settings,
    solo_tokens,
    until,
)


@pytest.fixture(scope="module")
def wanted(model):
    requests = mixed_requests(32, seed=1)
    return {one: solo_tokens(model, one) for one in requests}


@pytest.mark.parametrize(
    "chosen",
    [
        settings(prefill=0),
        settings(prefill=1),
        settings(prefill=2, decode=2),
        settings(prefill=1, transport="ray_object"),
        settings(prefill=1, kv_tokens=160, budget_tokens=9, max_running=3),
        settings(prefill=0, kv_tokens=88, budget_tokens=8),
    ],
    ids=["together", "apart", "two of each", "by value", "short of pages", "preempting"],
)
def test_tokens_are_those_of_each_request_alone(model, wanted, chosen):
    async def work():
        async with serving(chosen, model) as service:
            for _ in range(2):  # the second time much of it is cached
                tokens = await asyncio.gather(*(collect(service, one) for one in wanted))
                assert dict(zip(wanted, tokens, strict=True)) == wanted
            chosen_many = [decode(service, name) for name in replicas(service, "decode")]
            assert sum(d.local_prefills + d.remote_prefills for d in chosen_many) == 2 * len(wanted)
            assert (sum(d.remote_prefills for d in chosen_many) > 0) == bool(
                chosen.prefill.replicas
            )

    run(work())


def test_the_mix_is_a_mix(wanted):
    """What the test above rests on: long and short, every way to end, seeds that matter."""
    lengths = [len(one.prompt) for one in wanted]
    assert min(lengths) < 8 and max(lengths) > 40
    assert any(len(tokens) < one.limits.max_tokens for one, tokens in wanted.items())
    assert {one.sampling.temperature for one in wanted} == {0.0, 1.0}


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
def test_exactly_the_uncached_tokens_are_handed_over(model, transport):
    async def work():
        async with serving(settings(transport=transport), model) as service:
            replica, lender = decode(service), prefill(service)
            head = list(range(20))
            await collect(service, request("a", [*head, *range(100, 117)], 3))
            assert replica.handed_bytes == 37 * TOKEN_BYTES
            await collect(service, request("b", [*head, *range(200, 211)], 3))
            # Pages of 4 tokens: the 20 in common are here already.
            assert replica.handed_bytes == (37 + 11) * TOKEN_BYTES
            await until(lambda: lender.leases.counts.acknowledged == 2)
            assert lender.leases.counts.granted == 2
            assert replica.remote_prefills == 2 and replica.local_prefills == 0

    run(work())


def test_a_short_uncached_part_is_computed_where_it_is_decoded(model):
    async def work():
        async with serving(settings(), model) as service:
            one = request("a", list(range(7)), 3)
            assert await collect(service, one) == solo_tokens(model, one)
            long = request("b", list(range(40)), 3)
            assert await collect(service, long) == solo_tokens(model, long)
            again = request("c", [*range(40), 1, 2], 3)
            assert await collect(service, again) == solo_tokens(model, again)
            replica = decode(service)
            assert (replica.local_prefills, replica.remote_prefills) == (2, 1)
            assert prefill(service).loop.engine.prompt_tokens == 40

    run(work())


def test_a_request_that_no_replica_can_hold_is_refused(model):
    async def work():
        async with serving(settings(kv_tokens=64), model) as service:
            with pytest.raises(Exception, match="70 tokens; this replica holds at most 64") as told:
                await collect(service, request("a", [1] * 60, 10))
            assert getattr(told.value, "status", None) == 400
            one = request("b", [1] * 50, 10, Sampling(seed=3))
            assert await collect(service, one) == solo_tokens(model, one)

    run(work())


def test_a_request_id_in_use_is_refused(model):
    async def work():
        async with serving(settings(prefill=0), model) as service:
            one = request("same", [1, 2, 3], 200, ignore_eos=True)
            stream = service.ingress.generate(one)
            await anext(stream)
            with pytest.raises(Exception, match="already in use") as told:
                await collect(service, one)
            assert getattr(told.value, "status", None) == 400
            await stream.aclose()
            two = request("same", [1, 2, 3], 5)
            assert await collect(service, two) == solo_tokens(model, two)

    run(work())
