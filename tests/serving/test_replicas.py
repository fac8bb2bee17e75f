"""One prefill and one decode replica by themselves, in virtual time: leases, aborts, silence."""

import asyncio
import os
import re
import threading
from pathlib import Path

import pytest
import torch

from cluster.clock import VirtualClock
from serve import build
from serve.clients import Draining, ReplicaLost
from serve.decode import SILENT_INGRESS_S, DecodeReplica
from serve.directory import Directory, Entry
from serve.engine.sequence import Output, Sequence
from serve.kv.storage import KVShape, KVStorage
from serve.peers import PrefillPeers
from serve.prefill import PrefillReplica
from serve.prefixes import PlacedPrefixes
from serve.transport import HandoffLost, open_transport
from serve.transport.copy import receive
from serve.wire import Moved, unpack
from tests.serving.tiny import request, run, settings, solo_tokens, until

PROMPT = list(range(40))


def payload(name="a", max_tokens=4, prompt=PROMPT, **limits):
    return Sequence(request(name, prompt, max_tokens, **limits)).to_bytes()


def free(replica):
    stats = replica.loop.engine.stats()
    idle = not (stats.running or stats.waiting or stats.reserved or stats.held)
    return idle and stats.free_pages + stats.evictable_pages == stats.pages


def _nobody(replica_id):
    raise AssertionError(f"nothing is parked at {replica_id}")


class Gate:
    """Stops an engine before its next step until it is opened."""

    def __init__(self, replica):
        self.entered, self.open = threading.Event(), threading.Event()
        runner = replica.loop.engine.runner
        compute = runner.run

        def gated(slices):
            self.entered.set()
            assert self.open.wait(30)
            return compute(slices)

        runner.run = gated

    async def reached(self):
        await until(self.entered.is_set)


class Pair:
    """A prefill replica, started; `decode` makes a decode replica that knows it."""

    def __init__(self, model, **chosen):
        self.model, self.settings, self.clock = model, settings(**chosen), VirtualClock()
        self.lender = build.prefill_replica(
            self.settings, model, "prefill-1", f"sanderling-test-{os.getpid()}-pair", self.clock
        )
        self.replicas: list[PrefillReplica | DecodeReplica] = [self.lender]

    async def __aenter__(self):
        await self.lender.start()
        return self

    async def __aexit__(self, *_):
        for replica in self.replicas:
            await replica.stop()

    async def decode(self, connect=None):
        connect = build.Connect(connect or (lambda _: self.lender), _nobody)
        segment = f"sanderling-test-{os.getpid()}-decode-{len(self.replicas)}"
        replica = build.decode_replica(
            self.settings, self.model, "decode-1", segment, connect, self.clock
        )
        await replica.start()
        replica.update(Directory(1, (Entry("prefill-1", "prefill", "ready"),)))
        self.replicas.append(replica)
        return replica

    async def pass_time(self, seconds):
        """Virtual seconds; sweeps run on the engine's thread, so each is given real turns too."""
        for _ in range(4):
            await self.clock.advance(seconds / 4)
            await asyncio.sleep(0.02)


def test_an_offer_holds_its_pages_until_it_is_acknowledged(model):
    async def work():
        async with Pair(model) as pair:
            reply = await pair.lender.prefill(payload(), 8)
            assert (reply.offer.start_tokens, reply.offer.stop_tokens) == (8, 40)
            assert reply.token == solo_tokens(model, request("a", PROMPT, 1))[0]
            assert not free(pair.lender) and len(pair.lender.leases) == 1
            assert await pair.lender.acknowledge(reply.offer.lease_id) is True
            assert await pair.lender.acknowledge(reply.offer.lease_id) is False
            assert free(pair.lender) and len(pair.lender.leases) == 0
            again = await pair.lender.prefill(payload("b"), 0)
            assert again.cached_tokens == 36 and again.token == reply.token

    run(work())


def test_a_lease_ends_by_time_and_then_the_copy_fails(model):
    async def work():
        async with Pair(model, lease_s=5.0, kv_tokens=64) as pair:
            reply = await pair.lender.prefill(payload(prompt=range(41)), 0)
            await pair.pass_time(4.0)
            assert len(pair.lender.leases) == 1
            await pair.pass_time(2.0)
            assert len(pair.lender.leases) == 0 and free(pair.lender)
            assert await pair.lender.acknowledge(reply.offer.lease_id) is False
            transport = open_transport("shared_memory")
            target = KVStorage(pair.lender.storage.shape, "float32")
            pages = list(range(len(reply.offer.pages)))
            # Its full pages are still in the prefix cache; the last one is free, and that suffices.
            with pytest.raises(HandoffLost, match="ran out"):
                transport.fetch(reply.offer, target, pages)
            transport.close()

    run(work())


@pytest.mark.parametrize("when", ["computing", "lent", "unknown"])
def test_an_abort_frees_everything_and_ends_the_call(model, when):
    async def work():
        async with Pair(model) as pair:
            gate = Gate(pair.lender)
            if when == "lent":
                gate.open.set()
                await pair.lender.prefill(payload(), 0)
            call = None
            if when == "computing":
                call = asyncio.create_task(pair.lender.prefill(payload(), 0))
                await gate.reached()
            abort = asyncio.create_task(pair.lender.abort("a"))
            await asyncio.sleep(0.01)
            gate.open.set()
            assert await abort is (when != "unknown")
            if call is not None:
                # The caller may have gone without cancelling: the call must not stay for ever.
                with pytest.raises(HandoffLost, match="aborted"):
                    await call
            assert not pair.lender._waiting and not len(pair.lender.leases)
            await until(lambda: free(pair.lender))
            assert await pair.lender.abort("a") is False
            assert (await pair.lender.prefill(payload(), 0)).offer.stop_tokens == 40

    run(work())


def test_a_cancelled_prefill_frees_everything(model):
    async def work():
        async with Pair(model) as pair:
            gate = Gate(pair.lender)
            for opened in (False, True):
                call = asyncio.create_task(pair.lender.prefill(payload(), 0))
                await gate.reached()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                gate.open.set()
                await until(lambda: free(pair.lender))
                assert not pair.lender._waiting and not len(pair.lender.leases), opened

    run(work())


def test_the_same_request_twice_at_once_is_refused_without_harm(model):
    async def work():
        async with Pair(model) as pair:
            gate = Gate(pair.lender)
            first = asyncio.create_task(pair.lender.prefill(payload(), 0))
            await gate.reached()
            with pytest.raises(ValueError, match="already"):
                await pair.lender.prefill(payload(), 0)
            gate.open.set()
            reply = await first
            assert await pair.lender.acknowledge(reply.offer.lease_id)

    run(work())


async def read(replica, name, into):
    async for message in replica.tokens(name):
        into += unpack(message)


def test_a_silent_ingress_is_forgotten_and_told_so(model):
    async def work():
        async with Pair(model) as pair:
            replica = await pair.decode()
            silent, lively = list[Output](), list[Output]()
            reader = asyncio.create_task(read(replica, "i/1", silent))
            other = asyncio.create_task(read(replica, "i/2", lively))
            await asyncio.sleep(0)
            await replica.submit(payload("a", 800, [1, 2, 3], ignore_eos=True), "i/1")
            await replica.submit(payload("b", 150, [4, 5, 6], ignore_eos=True), "i/2")
            gate = Gate(replica)
            await gate.reached()
            for _ in range(4):
                await replica.ping("i/2")
                await pair.pass_time(SILENT_INGRESS_S / 3)
            await reader  # it ends, so that an ingress that was merely slow connects again
            assert set(replica._jobs) == {"b"} and set(replica._jobs.channels) == {"i/2"}
            gate.open.set()
            await until(lambda: not replica._jobs)
            await until(lambda: free(replica))
            await until(lambda: bool(lively) and lively[-1].delta.finish == "length")
            assert {o.request_id for o in silent} == {"a"} and len(silent) < 800
            assert len(lively) == 150 and not other.done()
            other.cancel()

    run(work())


@pytest.mark.parametrize("prompt", [[1, 2], PROMPT], ids=["here", "hand-off"])
def test_an_abort_between_submission_and_start_leaves_nothing(model, prompt):
    """The engine is busy in a step, so that the submission is still on its way when abort comes."""

    async def work():
        async with Pair(model) as pair:
            replica = await pair.decode()
            gate = Gate(replica)
            await replica.submit(payload("busy", 1, [9]), "i")
            await gate.reached()
            submission = asyncio.create_task(replica.submit(payload("a", 300, prompt), "i"))
            await asyncio.sleep(0.01)
            abort = asyncio.create_task(replica.abort(["a"]))
            await asyncio.sleep(0.01)
            gate.open.set()
            assert await abort == 1
            await submission
            await until(lambda: not replica._jobs and free(replica))
            await until(lambda: free(pair.lender) and not len(pair.lender.leases))
            assert await replica.abort(["a", "nobody"]) == 0
            assert replica.loop.engine.generated_tokens == 1, "it ran for nobody"
            assert replica.remote_prefills == 0 and pair.lender.loop.engine.steps == 0

    run(work())


def test_a_cancelled_submission_leaves_nothing(model):
    async def work():
        async with Pair(model) as pair:
            for prompt in ([1, 2], PROMPT):
                replica = await pair.decode()
                gate = Gate(replica)
                await replica.submit(payload("busy", 1, [9]), "i")
                await gate.reached()
                submission = asyncio.create_task(replica.submit(payload("a", 300, prompt), "i"))
                await asyncio.sleep(0.01)
                submission.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await submission
                gate.open.set()
                await until(lambda: not replica._jobs and free(replica))  # noqa: B023

    run(work())


def test_a_draining_replica_takes_nothing_new_and_sends_away_what_it_has(model):
    async def work():
        async with Pair(model) as pair:
            replica, heard = await pair.decode(), list[object]()
            reader = asyncio.create_task(read(replica, "i", heard))
            gate = Gate(replica)
            await replica.submit(payload("a", 300, [1]), "i")
            await gate.reached()
            drain = asyncio.create_task(replica.drain(1.0))
            await asyncio.sleep(0)
            with pytest.raises(Draining):
                await replica.submit(payload("b", 3, [1]), "i")
            assert (await replica.ping()).draining
            await pair.clock.advance(2)
            gate.open.set()
            assert await drain == 1
            await until(lambda: heard[-1:] == [Moved("a")])
            assert free(replica) and not replica._jobs
            reader.cancel()

    run(work())


def test_imports_wait_for_pages_and_all_finish(model):
    """More prompts than the decode replica has pages for, at once."""

    async def work():
        async with Pair(model, kv_tokens=64) as pair:
            replica, heard = await pair.decode(), list[object]()
            reader = asyncio.create_task(read(replica, "i", heard))
            await asyncio.gather(
                *(replica.submit(payload(f"r{n}", 5, [n, *PROMPT]), "i") for n in range(6))
            )
            await until(lambda: not replica._jobs)
            await until(lambda: free(replica) and free(pair.lender))
            assert replica.remote_prefills == 6 and replica.loop.engine.stats().preemptions == 0
            reader.cancel()

    run(work())


class Peer:
    """A prefill client that does what it is told."""

    def __init__(self, outcome):
        self.outcome, self.calls, self.aborted = outcome, [], []

    async def prefill(self, data, skip_tokens):
        self.calls.append(Sequence.from_bytes(data).request_id)
        if self.outcome == "hang":
            await asyncio.Event().wait()
        raise self.outcome

    async def acknowledge(self, lease_id):
        return True

    async def abort(self, request_id):
        self.aborted.append(request_id)
        return True


@pytest.mark.parametrize(
    "outcome", [ReplicaLost("x"), ValueError("too small"), HandoffLost("aborted"), "hang"]
)
def test_every_prefill_replica_is_tried_once_and_told_when_it_is_given_up(outcome):
    async def work():
        made = {"p1": Peer(outcome), "p2": Peer(outcome)}
        peers = PrefillPeers(made.__getitem__, prefixes=PlacedPrefixes(4, 100), deadline_s=0.05)
        directory = Directory(1, tuple(Entry(name, "prefill", "ready") for name in made))
        peers.update(directory)
        assert await peers.prefill(Sequence(request("a", [1, 2], 3))) is None
        await asyncio.sleep(0.01)
        for peer in made.values():
            assert peer.calls == ["a"]
            assert peer.aborted == (["a"] if outcome == "hang" else [])
        # A lost one is connected to anew when the directory still has it: names are used again.
        assert peers.any() is not isinstance(outcome, ReplicaLost)
        peers.update(directory)
        assert peers.any() and not peers._load_tokens and not peers._background

    run(work())


def test_a_reused_name_in_shared_memory_is_another_senders(model):
    """prefill-1 dies and another prefill-1 follows: its pages, not what the old mapping shows."""
    shape = KVShape(layers=1, pages=4, page_tokens=4, kv_heads=1, head_dim=2)
    name = f"sanderling-test-{os.getpid()}-reused"
    transport, target = open_transport("shared_memory"), KVStorage(shape, "float32")
    for value in (1.0, 2.0):
        sender = KVStorage(shape, "float32", name)
        sender.tensor.fill_(value)
        offer = transport.offer("lease", sender, [0, 1], 0, 8)
        assert transport.fetch(offer, target, [2, 3]) == 2 * 1 * 2 * 8 * 4
        assert target.tensor[:, :, 2:].unique().tolist() == [value]
        sender.close()
    with pytest.raises(HandoffLost):
        transport.fetch(offer, target, [2, 3])
    transport.close()


def test_a_page_that_changes_hands_during_the_copy_is_noticed(monkeypatch):
    shape = KVShape(layers=1, pages=4, page_tokens=4, kv_heads=1, head_dim=2)
    sender = KVStorage(shape, "float32", f"sanderling-test-{os.getpid()}-raced")
    transport, target = open_transport("shared_memory"), KVStorage(shape, "float32")
    offer = transport.offer("lease", sender, [0, 1], 0, 8)

    def copy(*arguments):
        copied = receive(*arguments)
        sender.generation[1] += 1
        return copied

    monkeypatch.setattr("serve.transport.shared_memory.receive", copy)
    with pytest.raises(HandoffLost, match="ran out"):
        transport.fetch(offer, target, [2, 3])
    transport.close()
    sender.close()


def test_memory_of_senders_that_are_gone_is_let_go():
    shape = KVShape(layers=1, pages=4, page_tokens=4, kv_heads=1, head_dim=2)
    transport, target = open_transport("shared_memory"), KVStorage(shape, "float32")
    for number in range(20):
        sender = KVStorage(shape, "float32", f"sanderling-test-{os.getpid()}-n{number}")
        transport.fetch(transport.offer("lease", sender, [0], 0, 4), target, [1])
        sender.close()
    maps = Path("/proc/self/maps").read_text()
    gone = set(re.findall(rf"sanderling-test-{os.getpid()}-n\d+", maps))
    assert gone <= {f"sanderling-test-{os.getpid()}-n19"}
    transport.close()


@pytest.mark.parametrize("name", ["shared_memory", "ray_object"])
@pytest.mark.parametrize("kv_format,head_bytes", [("bfloat16", 64), ("int8", 36), ("int4", 20)])
@pytest.mark.parametrize("tokens,start", [(1, 0), (7, 0), (8, 0), (5, 4), (0, 0)])
def test_a_copy_moves_exactly_the_tokens_offered(name, kv_format, head_bytes, tokens, start):
    shape = KVShape(layers=2, pages=6, page_tokens=4, kv_heads=3, head_dim=32)
    sender = KVStorage(shape, kv_format, f"sanderling-test-{os.getpid()}-exact")
    sender.tensor.random_(1, 256)
    target = KVStorage(shape, kv_format)
    transport = open_transport(name)
    count = -(-tokens // 4)
    theirs, ours = [5, 2, 3][:count], [0, 4, 1][:count]
    offer = transport.offer("lease", sender, theirs, start, start + tokens)
    assert transport.fetch(offer, target, ours) == 2 * 2 * 3 * head_bytes * tokens
    got = target.tensor[:, :, ours].flatten(2, 3)
    wanted = sender.tensor[:, :, theirs].flatten(2, 3)
    assert torch.equal(got[:, :, :tokens], wanted[:, :, :tokens])
    assert not target.tensor.any() or tokens
    assert int((target.tensor != 0).any(-1).any(-1).any(0).any(0).sum()) == tokens
    transport.close()
    sender.close()


@pytest.mark.parametrize("name", ["shared_memory", "ray_object"])
def test_replicas_whose_caches_differ_refuse_each_other(name):
    """uint8 on both sides, and a wrong answer if it were only looked at as bytes."""
    shape = KVShape(layers=1, pages=2, page_tokens=4, kv_heads=1, head_dim=32)
    sender = KVStorage(shape, "int8", f"sanderling-test-{os.getpid()}-unlike")
    transport, target = open_transport(name), KVStorage(shape, "int4")
    offer = transport.offer("lease", sender, [0], 0, 4)
    with pytest.raises(ValueError, match="in int8, ours in int4; engine.kv_dtype must be equal"):
        transport.fetch(offer, target, [1])
    transport.close()
    sender.close()
