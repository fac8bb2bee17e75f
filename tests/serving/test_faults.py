"""Replicas that die, drain, lose leases or are abandoned: the same tokens, and nothing left over.

`serving` asserts in the end that every page is free or cached and no lease or request is left.
"""

import asyncio
import random
import threading

import pytest

from serve.engine.sequence import Sequence
from serve.transport import HandoffLost
from tests.serving.tiny import (
    TOKEN_BYTES,
    collect,
    decode,
    first_token,
    mixed_requests,
    prefill,
    replicas,
    request,
    run,
    serving,
    settings,
    settled,
    slow,
    solo_tokens,
    until,
)

PROMPT = list(range(50))


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
@pytest.mark.parametrize("others", [0, 1])
def test_prefill_killed_while_it_computes(model, transport, others):
    async def work():
        one = request("a", PROMPT, 6)
        async with serving(settings(prefill=1 + others, transport=transport), model) as service:
            slow(prefill(service, "prefill-1"))
            stream = asyncio.create_task(collect(service, one))
            await until(lambda: bool(prefill(service, "prefill-1")._waiting))
            service.launcher.kill("prefill-1")
            assert await stream == solo_tokens(model, one)
            assert decode(service).remote_prefills == others
            await until(lambda: "prefill-1" not in service.launcher.members)
            await until(lambda: len(service.ingress.directory.ready("prefill")) == 1 + others)

    run(work())


@pytest.mark.parametrize("transport", ["shared_memory", "ray_object"])
def test_prefill_killed_between_its_reply_and_the_copy(model, transport):
    async def work():
        one = request("a", PROMPT, 6)
        async with serving(settings(transport=transport), model) as service:
            peers, name = decode(service).peers, replicas(service, "prefill")[0]
            ask, storage = peers.prefill, prefill(service).storage

            async def killed_after(sequence):
                reply = await ask(sequence)
                service.launcher.kill(name)
                await until(lambda: storage._tensor is None)  # closed: its file is gone
                return reply

            peers.prefill = killed_after
            assert await collect(service, one) == solo_tokens(model, one)
            # By value the pages are here already; else the sender's memory went with it.
            assert decode(service).remote_prefills == (transport == "ray_object")

    run(work())


def test_decode_killed_in_mid_stream(model):
    async def work():
        requests = [request(f"r{n}", [n, *PROMPT[: n * 5]], 30, ignore_eos=True) for n in range(8)]
        async with serving(settings(prefill=1, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            streams = [asyncio.create_task(collect(service, one)) for one in requests]
            records = service.ingress._records
            await until(lambda: any(len(r.sequence.output) > 5 for r in records.values()))
            victim = next(r.replica_id for r in records.values() if len(r.sequence.output) > 5)
            assert victim is not None
            service.launcher.kill(victim)
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            assert service.ingress.resumed > 0
            await until(lambda: len(service.ingress.directory.ready("decode")) == 2)
            assert victim not in service.launcher.members

    run(work())


def test_the_only_decode_replica_killed(model):
    async def work():
        one = request("a", PROMPT, 30, ignore_eos=True)
        async with serving(settings(), model) as service:
            slow(decode(service))
            stream = asyncio.create_task(collect(service, one))
            await first_token(service, "a")
            service.launcher.kill(replicas(service, "decode")[0])
            assert await stream == solo_tokens(model, one)

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_kills(model, seed):
    async def work():
        rng = random.Random(seed)
        requests = mixed_requests(24, seed=100 + seed)
        chosen = settings(prefill=2, decode=2, kv_tokens=256)
        async with serving(chosen, model) as service:
            streams = [asyncio.create_task(collect(service, one)) for one in requests]
            for _ in range(4):
                await asyncio.sleep(rng.uniform(0, 0.1))
                alive = [n for n, m in service.launcher.members.items() if not m.dead.is_set()]
                service.launcher.kill(rng.choice(alive))
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            await until(lambda: len(service.ingress.directory.ready("decode")) == 2)
            await until(lambda: len(service.ingress.directory.ready("prefill")) == 2)

    run(work())


@pytest.mark.parametrize("deadline_s", [0.0, 0.1])
def test_drain_moves_what_does_not_finish_in_time(model, deadline_s):
    async def work():
        requests = [request(f"r{n}", [n, *PROMPT], 20 + n, ignore_eos=True) for n in range(6)]
        async with serving(settings(prefill=1, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            streams = [asyncio.create_task(collect(service, one)) for one in requests]
            records = service.ingress._records
            await until(lambda: all(r.sequence.output for r in records.values()) and bool(records))
            leaving = replicas(service, "decode")[0]
            had = {r.sequence.request_id for r in records.values() if r.replica_id == leaving}
            await service.controller.drain(leaving, deadline_s)
            assert leaving not in service.launcher.members
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            assert had and service.ingress.resumed == len(had)
            assert len(replicas(service, "decode")) == 2

    run(work())


def test_a_drain_with_time_moves_nothing(model):
    async def work():
        one = request("a", PROMPT, 10, ignore_eos=True)
        async with serving(settings(decode=1), model) as service:
            stream = asyncio.create_task(collect(service, one))
            await first_token(service, "a")
            leaving = decode(service)
            await service.controller.drain(leaving.replica_id, 30.0)
            assert await stream == solo_tokens(model, one)
            # The last message may still have been on its way: then the end is computed again.
            assert service.ingress.resumed <= 1 and leaving.draining

    run(work())


def test_a_drained_prefill_replica_finishes_what_it_has_lent(model):
    async def work():
        requests = [request(f"r{n}", [n, *PROMPT], 5) for n in range(6)]
        async with serving(settings(prefill=2), model) as service:
            streams = [asyncio.create_task(collect(service, one)) for one in requests]
            await until(lambda: bool(prefill(service, "prefill-1")._waiting))
            await service.controller.drain("prefill-1", 30.0)
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            assert decode(service).remote_prefills == 6

    run(work())


def test_a_lease_that_ran_out_is_recomputed(model):
    """The receiver is so late that the pages lent to it hold another prompt: never its tokens."""

    async def work():
        one, other = request("a", PROMPT, 6), request("b", PROMPT[::-1], 6)
        chosen = settings(lease_s=0.05, kv_tokens=88)
        async with serving(chosen, model) as service:
            replica, lender = decode(service), prefill(service)
            ask = replica.peers.prefill
            lost: list[bool] = []

            async def late(sequence):
                reply = await ask(sequence)
                await until(lambda: not len(lender.leases))
                again = lambda e: e.scheduler.tree.evict(e.scheduler.pool.pages)  # noqa: E731
                await asyncio.wrap_future(lender.loop.call(again))
                lost.append(True)
                return reply

            replica.peers.prefill = late
            assert await collect(service, one) == solo_tokens(model, one)
            assert await collect(service, other) == solo_tokens(model, other)
            assert lost == [True, True]
            assert replica.remote_prefills == 0 and replica.local_prefills == 2
            assert replica.handed_bytes == 0
            assert lender.leases.counts.expired == 2

    run(work())


def test_pages_that_change_hands_during_the_copy_are_not_used(model):
    async def work():
        one = request("a", PROMPT, 6)
        async with serving(settings(), model) as service:
            replica, lender = decode(service), prefill(service)
            fetch = replica.transport.fetch

            def raced(offer, storage, pages):
                lender.storage.tensor.fill_(7.0)  # what another prompt would write
                lender.storage.generation[offer.pages[0]] += 1
                lender.loop.engine.scheduler.pool._generation_sum += 1
                return fetch(offer, storage, pages)

            replica.transport.fetch = raced
            with pytest.raises(HandoffLost):
                reply = await replica.peers.prefill(Sequence(one))
                try:
                    raced(reply.offer, replica.storage, list(range(13)))
                finally:
                    replica.peers.acknowledge(reply.offer.lease_id)
            assert await collect(service, one) == solo_tokens(model, one)
            assert replica.remote_prefills == 0

    run(work())


@pytest.mark.parametrize("seed", range(3))
def test_clients_that_leave_at_any_moment(model, seed):
    """An abort storm: streams are closed or their tasks cancelled; whoever stays is served."""

    async def work():
        rng = random.Random(seed)
        requests = mixed_requests(40, seed=200 + seed)
        chosen = settings(prefill=1, decode=2, kv_tokens=256)
        async with serving(chosen, model) as service:

            async def leave_after(one, deltas):
                stream = service.ingress.generate(one)
                async for _ in stream:
                    deltas -= 1
                    if deltas <= 0:
                        break
                await stream.aclose()

            stay = [asyncio.create_task(collect(service, one)) for one in requests[::4]]
            for at, one in enumerate(requests):
                if at % 4 == 0:
                    continue
                leaving = asyncio.create_task(leave_after(one, rng.randint(1, 5)))
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.01]))
                if at % 4 > 1:
                    leaving.cancel()
            for one, stream in zip(requests[::4], stay, strict=True):
                assert await stream == solo_tokens(model, one)
            await settled(service)
            # The names are free again.
            one = requests[1]
            assert await collect(service, one) == solo_tokens(model, one)

    run(work())


@pytest.mark.parametrize("turns", range(0, 40, 2))
def test_a_client_that_leaves_after_so_many_turns_of_the_loop(model, turns):
    """Every await on the way of a hand-off, one after the other, is cancelled."""

    async def work():
        one = request("a", PROMPT, 400, ignore_eos=True)
        async with serving(settings(), model) as service:
            task = asyncio.create_task(collect(service, one))
            for _ in range(turns):
                await asyncio.sleep(0.0005 if turns > 12 else 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(service)
            two = request("a", PROMPT, 3)
            assert await collect(service, two) == solo_tokens(model, two)

    run(work())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_sends_its_requests_on(model):
    async def work():
        requests = [request(f"r{n}", [n, *PROMPT], 12, ignore_eos=True) for n in range(4)]
        async with serving(settings(prefill=1, decode=2), model) as service:
            for name in replicas(service, "decode"):
                slow(decode(service, name))
            streams = [asyncio.create_task(collect(service, one)) for one in requests]
            records = service.ingress._records
            await until(lambda: any(r.sequence.output for r in records.values()))
            victim = next(r.replica_id for r in records.values() if r.sequence.output)

            def fail(_):
                raise RuntimeError("the model broke")

            decode(service, victim).loop.engine.runner.run = fail
            for one, stream in zip(requests, streams, strict=True):
                assert await stream == solo_tokens(model, one)
            await until(lambda: victim not in service.launcher.members)

    run(work())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_prefill_engine_that_dies_is_replaced_and_the_prompt_computed_elsewhere(model):
    async def work():
        one = request("a", PROMPT, 6)
        async with serving(settings(), model) as service:
            lender = prefill(service)

            def fail(_):
                raise RuntimeError("the model broke")

            lender.loop.engine.runner.run = fail
            assert await collect(service, one) == solo_tokens(model, one)
            assert decode(service).local_prefills == 1
            await until(lambda: lender.replica_id not in service.launcher.members)
            await until(lambda: len(service.ingress.directory.ready("prefill")) == 1)
            two = request("b", PROMPT[::-1], 6)
            await until(decode(service).peers.any)
            assert await collect(service, two) == solo_tokens(model, two)
            assert decode(service).handed_bytes == len(PROMPT) * TOKEN_BYTES

    run(work())


def test_an_unexpected_error_of_a_hand_off_ends_the_request_with_a_sentence(model):
    async def work():
        async with serving(settings(), model) as service:

            def broken(*_):
                raise OSError("the disk is full")

            decode(service).transport.fetch = broken
            deltas = [d async for d in service.ingress.generate(request("a", PROMPT, 6))]
            assert [d.finish for d in deltas] == ["error"]
            assert deltas[0].error == "The request failed on its replica: the disk is full"
            await settled(service)

    run(work(), expected=("the disk is full",))


def test_a_prefill_that_takes_too_long_is_given_up_and_aborted(model):
    async def work():
        one = request("a", PROMPT, 4)
        async with serving(settings(deadline_s=0.2), model) as service:
            lender = prefill(service)
            compute, gate = lender.loop.engine.runner.run, threading.Event()
            lender.loop.engine.runner.run = lambda slices: (gate.wait(20), compute(slices))[1]
            assert await collect(service, one) == solo_tokens(model, one)
            assert decode(service).local_prefills == 1
            gate.set()
            await settled(service)
            assert lender.leases.counts.granted == 0

    run(work())
