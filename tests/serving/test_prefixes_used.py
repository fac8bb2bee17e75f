"""Prefixes where they count: a follow-up prompt goes to the prefill replica that computed the first
one, and the ingress's belief about caches is held against what the caches really had."""

import asyncio

from tests.serving.tiny import (
    collect,
    prefill,
    replicas,
    request,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
    until,
)


def talk(number: int, tokens: int) -> list[int]:
    return [(17 * number + 3 * n + n * n) % 256 for n in range(tokens)]


def test_a_follow_up_goes_to_the_prefill_replica_that_has_its_beginning(model):
    async def work():
        async with serving(settings(prefill=2, decode=1), model) as service:
            names = replicas(service, "prefill")
            for name in names:
                slow(prefill(service, name))
            engines = {name: prefill(service, name).loop.engine for name in names}
            first = [
                asyncio.create_task(collect(service, request(f"a{n}", talk(n, 40), 1)))
                for n in range(2)
            ]
            await asyncio.gather(*first)
            assert {engine.prompt_tokens for engine in engines.values()} == {40}, "one each"
            # The other way round, so that load and name alone would send each to the other one.
            second = []
            for n in (1, 0):
                asked = request(f"b{n}", talk(n, 80), 3, ignore_eos=True)
                second.append((asked, asyncio.create_task(collect(service, asked))))
                await until(lambda name=asked.request_id: name in service.ingress._records)  # type: ignore[misc]
            for asked, stream in second:
                assert await stream == solo_tokens(model, asked)
            hits = [engine.scheduler.tree.hits_tokens for engine in engines.values()]
            assert hits == [40, 40]

    run(work())


def test_what_was_believed_cached_is_held_against_what_was(model):
    async def work():
        async with serving(settings(prefill=0, decode=1), model) as service:
            guesses = service.ingress.guesses
            for n, (expected, found) in enumerate([(0, 0), (36, 36), (72, 72)]):
                await collect(service, request(f"r{n}", talk(1, 40), 2))
                assert (guesses.expected_tokens, guesses.found_tokens) == (expected, found)
            assert (guesses.hit, guesses.miss) == (2, 1)
            engine = service.launcher.members["decode-1"].replica.loop.engine
            engine.scheduler.tree.make_room(engine.scheduler.pool.pages)  # everything is evicted
            await collect(service, request("late", talk(1, 40), 2))
            assert (guesses.expected_tokens, guesses.found_tokens) == (108, 72)

    run(work())
