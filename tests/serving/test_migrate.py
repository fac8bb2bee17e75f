"""A draining replica's live sequences go on elsewhere, from their pages where the plan says so."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from cluster.settings import Settings
from serve.clients import ReplicaLost
from serve.engine.sequence import Sampling, Sequence
from serve.grammar.terms import Grammar
from serve.kv.prefix import CacheKey
from serve.migrate.parking import digest
from serve.transport.shared_memory import SharedMemoryTransport
from tests.serving.tiny import (
    KEY,
    TOKEN_BYTES,
    collect,
    decode,
    ready,
    replicas,
    request,
    run,
    serving,
    settings,
    slow,
    solo_tokens,
    until,
)

PROMPT = list(range(40))
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 40}


def chosen(decode=2, *, migrate=None, **more) -> Settings:
    """Decode replicas alone, so that whatever is computed or moved is seen there."""
    made = settings(prefill=0, decode=decode, **more)
    section = made.migrate.model_copy(update=migrate or {})
    return made.model_copy(update={"migrate": section})


def ongoing(count=4, prompt=PROMPT, tokens=60):
    return [request(f"r{n}", [n, *prompt], tokens, ignore_eos=True) for n in range(count)]


async def in_the_middle(service, requests, tokens=3):
    """Streams of all requests, each of which has made so many tokens."""
    for name in replicas(service, "decode"):
        slow(decode(service, name))
    streams = [asyncio.create_task(collect(service, one)) for one in requests]
    records = service.ingress._records

    def under_way():
        made = [len(record.sequence.output) for record in records.values()]
        return len(made) == len(requests) and min(made) >= tokens

    await until(under_way)
    return streams


def at(service, replica_id):
    records = service.ingress._records.values()
    return {r.sequence.request_id for r in records if r.replica_id == replica_id}


async def drained(service, requests, deadline_s=1.0):
    """The tokens of requests in whose middle a replica was drained, and which of them it had."""
    streams = await in_the_middle(service, requests)
    leaving = replicas(service, "decode")[0]
    had = at(service, leaving)
    await service.controller.drain(leaving, deadline_s)
    assert leaving not in service.launcher.members
    return [await stream for stream in streams], had


class Counted:
    """Sums over the decode replicas that are there."""

    def __init__(self, service):
        every = [decode(service, name) for name in replicas(service, "decode")]
        counts = [replica.arrivals.counts for replica in every]
        self.requests = sum(c.requests for c in counts)
        self.tokens = sum(c.tokens for c in counts)
        self.bytes = sum(c.bytes for c in counts)
        self.failed = sum(c.failed for c in counts)
        self.again = sum(replica.loop.engine.recomputed_tokens for replica in every)


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
def test_a_drain_moves_pages_and_computes_nothing_again(model, transport):
    async def work():
        requests = ongoing()
        async with serving(chosen(transport=transport), model) as service:
            tokens, had = await drained(service, requests)
            assert tokens == [solo_tokens(model, one) for one in requests]
            moved = Counted(service)
            assert had and moved.requests == len(had) and moved.failed == 0
            assert moved.again == 0
            assert moved.tokens > len(had) * len(PROMPT)
            assert moved.bytes == moved.tokens * TOKEN_BYTES
            metrics = (await service.ingress.status())["metrics"]
            await until(lambda: service.ingress._totals.counters()["migrated_requests"] == len(had))
            assert {"migrated_bytes", "migrated_recomputed_tokens"} <= set(metrics)
            await ready(service)

    run(work())


def test_without_pages_everything_is_computed_again(model):
    """What the test above would see if nothing moved: the replay of before."""

    async def work():
        requests = ongoing()
        async with serving(chosen(migrate={"pages": False}), model) as service:
            assert decode(service).storage.name is None
            tokens, had = await drained(service, requests)
            assert tokens == [solo_tokens(model, one) for one in requests]
            moved = Counted(service)
            assert (moved.requests, moved.bytes, moved.failed) == (0, 0, 0)
            assert had and moved.again > len(had) * len(PROMPT)

    run(work())


def demanding(model):
    """Requests with every kind of state that has to go along."""
    sampled = Sampling(1.0, 40, 0.95, seed=11, frequency_penalty=0.5, repetition_penalty=1.2)
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    plain = partial(request, prompt=PROMPT, max_tokens=60, ignore_eos=True)
    banned = replace(sampled, logit_bias=((65, 3.0), (7, -100.0)), presence_penalty=0.3)
    return [
        replace(request("form", PROMPT, 60, Sampling(1.0, seed=4)), grammar=grammar),
        replace(plain("seed", sampling=sampled), logprobs=3),
        replace(plain("sure"), logprobs=0),
        plain("bias", sampling=banned, min_tokens=30, stop=("zz", "A\x01", "e")),
        *(
            replace(plain(f"n{k}", sampling=replace(sampled, seed=k)), group="choices")
            for k in range(3)
        ),
        replace(plain("adapter"), cache_key=CacheKey("tenant", "lora", "")),
        replace(plain("other"), cache_key=KEY._replace(salt="another")),
    ]


async def deltas_of(service, one):
    async with aclosing(service.ingress.generate(one)) as stream:
        found = [delta async for delta in stream]
    tokens = [token for delta in found for token in delta.token_ids]
    logprobs = [entry for delta in found for entry in delta.logprobs]
    return tokens, logprobs, found[-1].finish, found[-1].stop


def test_form_seed_logprobs_stops_choices_and_adapters_survive(model):
    async def work():
        requests = demanding(model)
        async with serving(chosen(1, max_running=16), model) as service:
            undisturbed = [await deltas_of(service, one) for one in requests]
        async with serving(chosen(1, max_running=16), model) as service:
            slow(decode(service))
            streams = [asyncio.create_task(deltas_of(service, one)) for one in requests]
            records = service.ingress._records
            await until(
                lambda: (
                    len(records) == len(requests)
                    and min(len(r.sequence.output) for r in records.values()) > 2
                )
            )
            await service.controller.drain(replicas(service, "decode")[0], 1.0)
            assert [await stream for stream in streams] == undisturbed
            moved = Counted(service)
            assert moved.requests == len(requests) and (moved.failed, moved.again) == (0, 0)
            # Three choices share the pages of their prompt there as here.
            whole = len(requests) * len(PROMPT)
            assert moved.tokens < whole + len(requests) * 60 - 2 * (len(PROMPT) - 4)

    run(work())


def test_the_pages_of_choices_cross_once(model):
    async def work():
        alike = [replace(one, prompt=tuple(PROMPT), group="g") for one in ongoing(3)]
        async with serving(chosen(1), model) as service:
            tokens, had = await drained(service, alike)
            assert tokens == [solo_tokens(model, one) for one in alike] and len(had) == 3
            moved = Counted(service)
            assert (moved.requests, moved.again, moved.failed) == (3, 0, 0)
            outputs = moved.tokens - len(PROMPT)
            assert outputs < 2 * len(PROMPT), "the prompt crossed more than once"

    run(work())


def test_a_prompt_in_the_middle_of_its_computation_moves_too(model):
    async def work():
        long = request("long", [n % 251 for n in range(320)], 3)
        async with serving(chosen(budget_tokens=8), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            stream = asyncio.create_task(collect(service, long))
            records = service.ingress._records
            await until(lambda: bool(records) and records["long"].replica_id is not None)
            leaving = records["long"].replica_id
            assert leaving is not None
            engine = decode(service, leaving).loop.engine
            await until(lambda: any(s.computed_tokens > 64 for s in engine.scheduler.running))
            await service.controller.drain(leaving, 0.6)
            assert await stream == solo_tokens(model, long)
            moved = Counted(service)
            assert moved.requests == 1 and 64 < moved.tokens < 320
            assert moved.again == 0 and not records

    run(work())


def test_a_prompt_that_is_scored_starts_again(model):
    """What has been found out of it is not in its pages."""

    async def work():
        one = replace(request("s", [n % 251 for n in range(300)], 1), score=2)
        async with serving(chosen(budget_tokens=8), model) as service:
            undisturbed = [d async for d in service.ingress.generate(one)]
            for name in replicas(service, "decode"):
                slow(decode(service, name))

            async def scored():
                return [d async for d in service.ingress.generate(one)]

            stream = asyncio.create_task(scored())
            records = service.ingress._records
            await until(lambda: bool(records) and records["s"].replica_id is not None)
            leaving = records["s"].replica_id
            assert leaving is not None
            engine = decode(service, leaving).loop.engine
            await until(lambda: any(s.computed_tokens > 64 for s in engine.scheduler.running))
            await service.controller.drain(leaving, 0.2)
            assert [d.scores for d in await stream] == [d.scores for d in undisturbed]
            assert Counted(service).requests == 0

    run(work())


def test_the_only_replica_waits_for_its_replacement(model):
    """Nothing is parked before somebody is there to take it."""

    async def work():
        requests = ongoing(3, tokens=120)
        async with serving(chosen(1), model) as service:
            start = service.launcher.start

            async def late(role, replica_id):
                await asyncio.sleep(0.8)  # the leaving one has been draining meanwhile
                await start(role, replica_id)

            service.launcher.start = late  # type: ignore[method-assign]
            tokens, had = await drained(service, requests, 1.0)
            assert tokens == [solo_tokens(model, one) for one in requests] and len(had) == 3
            moved = Counted(service)
            assert (moved.requests, moved.failed, moved.again) == (3, 0, 0)

    run(work())


def test_scaling_down_moves_pages(model):
    async def work():
        requests = ongoing(6)
        async with serving(chosen(2), model) as service:
            streams = await in_the_middle(service, requests)
            leaving = replicas(service, "decode")[-1]
            had = at(service, leaving)
            await service.controller.scale("decode", 1, 1.0)
            assert [await s for s in streams] == [solo_tokens(model, one) for one in requests]
            await until(lambda: leaving not in service.launcher.members)
            moved = Counted(service)
            assert had and (moved.requests, moved.again) == (len(had), 0)

    run(work())


async def meddled(model, meddle, requests=None, deadline_s=1.0, **more):
    """Drain a replica whose parked pages something happens to; what was counted. Tokens must be
    those of an undisturbed run whatever happens."""
    requests = requests or ongoing(4)
    async with serving(chosen(2, **more), model) as service:
        leaving = replicas(service, "decode")[0]
        meddle(service, leaving)
        tokens, had = await drained(service, requests, deadline_s)
        assert tokens == [solo_tokens(model, one) for one in requests]
        assert had
        await ready(service)
        return Counted(service), len(had)


def exporting(service, leaving, before):
    """Have `before(lease_id)` awaited before each answer to whoever takes over."""
    replica = decode(service, leaving)
    export = replica.export

    async def meddling(lease_id, skip_tokens):
        await before(lease_id)
        return await export(lease_id, skip_tokens)

    replica.export = meddling


def test_a_lease_that_has_ended_is_computed_again(model):
    async def work():
        def meddle(service, leaving):
            exporting(service, leaving, decode(service, leaving).acknowledge)

        moved, had = await meddled(model, meddle)
        assert (moved.requests, moved.failed, moved.bytes) == (0, had, 0)
        assert moved.again > had * len(PROMPT)

    run(work())


def test_a_source_that_is_killed_in_the_middle_loses_nothing(model):
    async def work():
        def meddle(service, leaving):
            async def die(_):
                service.launcher.kill(leaving)

            exporting(service, leaving, die)

        moved, had = await meddled(model, meddle)
        assert moved.failed >= 1 and moved.requests == 0 and moved.again > had * len(PROMPT)

    run(work())


def test_a_source_that_never_answers_holds_up_nothing_for_ever(model):
    async def work():
        def meddle(service, leaving):
            async def hang(_):
                await asyncio.sleep(600)

            exporting(service, leaving, hang)

        moved, had = await meddled(model, meddle, deadline_s=0.8)
        assert 0 < moved.failed <= had and moved.requests == 0

    run(work())


def test_a_taker_that_is_killed_in_the_middle_loses_nothing(model):
    async def work():
        killed: list[str] = []

        def meddle(service, leaving):
            async def kill_the_other(_):
                other = [r for r in replicas(service, "decode") if r != leaving]
                if not killed:
                    killed.extend(other)
                    service.launcher.kill(other[0])
                await asyncio.sleep(0.01)

            exporting(service, leaving, kill_the_other)

        await meddled(model, meddle)
        assert killed

    run(work())


def test_pages_that_change_hands_under_the_copy_are_not_used(model, monkeypatch):
    """The sender writes other keys and values over them and gives them a newer generation."""

    async def work():
        def meddle(service, leaving):
            source, fetch = decode(service, leaving), SharedMemoryTransport.fetch

            def raced(self, offer, storage, pages):
                source.storage.tensor[:, :, list(offer.pages)] = 7.0
                source.storage.generation[offer.pages[0]] += 1
                source.loop.engine.scheduler.pool._generation_sum += 1
                return fetch(self, offer, storage, pages)

            monkeypatch.setattr(SharedMemoryTransport, "fetch", raced)

        moved, had = await meddled(model, meddle)
        assert (moved.requests, moved.failed) == (0, had) and moved.again > 0

    run(work())


def test_the_pages_of_other_tokens_are_never_taken(model):
    async def work():
        def meddle(service, leaving):
            parking = decode(service, leaving).parking
            park = parking.park

            def mistaken(engine, *more):
                parked = park(engine, *more)
                return parked and replace(parked, digest=parked.digest[::-1])

            parking.park = mistaken

        moved, had = await meddled(model, meddle)
        assert (moved.requests, moved.failed) == (0, had) and moved.again > 0

    run(work())


def test_a_digest_tells_tokens_keys_and_lengths_apart():
    one = Sequence(request("a", [1, 2, 3], 4), [4])
    other = replace(one.request, cache_key=KEY._replace(adapter="b"))
    marks = {digest(one, 4), digest(one, 3), digest(Sequence(other, [4]), 4)}
    marks |= {digest(Sequence(request("a", [12, 3], 4), [4]), 3)}
    assert len(marks) == 4
    assert digest(one, 4) == digest(Sequence(request("z", [1, 2], 4), [3, 4]), 4)


def test_a_client_that_leaves_while_its_pages_are_parked_leaves_nothing(model):
    async def work():
        requests = ongoing(2)
        async with serving(chosen(1), model) as service:
            streams = await in_the_middle(service, requests)
            service.controller.wanted["decode"] = 0  # nobody takes over
            leaving = decode(service)
            leaving._elsewhere, leaving.update = True, lambda directory: None
            drain = asyncio.create_task(service.controller.drain(leaving.replica_id, 1.0))
            await until(lambda: len(leaving.parking.leases) == 2)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await drain
            assert leaving.parking.leases.counts.expired == 2 and not leaving.parking._lent
            assert leaving.loop.engine.stats().held == 0

    run(work())


def test_what_is_lossy_is_only_done_where_it_is_allowed(model):
    """A link so slow that the pages of a few do not fit, and a quarter of them do."""

    async def work(lossy):
        requests = ongoing(4, prompt=[n % 250 for n in range(200)], tokens=60)
        slow_link = {"link_bytes_per_s": 4e5, "lossy": lossy}
        # Sequences of about 210 tokens of 256 bytes: 0.13 s each, or a third of that in int8.
        async with serving(
            chosen(1, migrate=slow_link, budget_tokens=512, kv_tokens=2048), model
        ) as service:
            tokens, had = await drained(service, requests, 0.4)
            await ready(service)
            assert len(had) == 4
            return tokens, Counted(service), decode(service).loop.engine

    async def both():
        exact = [solo_tokens(model, one) for one in ongoing(4, [n % 250 for n in range(200)])]
        tokens, moved, _ = await work(False)
        assert tokens == exact and moved.bytes == moved.tokens * TOKEN_BYTES
        tokens, moved, engine = await work(True)
        assert [len(each) for each in tokens] == [60] * 4
        assert 0 < moved.bytes < moved.tokens * TOKEN_BYTES
        assert engine.scheduler.tree.held_pages * 4 < 4 * 210, "inexact pages were shared"

    run(both())


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_drains_and_kills(model, seed):
    async def work():
        requests = ongoing(16, prompt=PROMPT[: 20 + seed], tokens=40)
        async with serving(chosen(3, kv_tokens=512), model) as service:
            streams = await in_the_middle(service, requests, tokens=1)
            for turn in range(4):
                serve = service.ingress.directory.ready("decode")
                victim = serve[turn % len(serve)].replica_id
                if turn % 2:
                    service.launcher.kill(victim)
                else:
                    await service.controller.drain(victim, 0.3)
                await until(lambda: len(service.ingress.directory.ready("decode")) > 1)
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            await ready(service)

    run(work())


def test_an_unknown_lease_is_lost(model):
    async def work():
        async with serving(chosen(1), model) as service:
            replica = decode(service)
            assert await replica.acknowledge("decode-1/x/0") is False
            with pytest.raises(Exception, match="has ended"):
                await replica.export("decode-1/x/0", 0)
            service.launcher.kill(replica.replica_id)
            with pytest.raises(ReplicaLost):
                await service.launcher.connect_decode(replica.replica_id).export("x", 0)

    run(work())
