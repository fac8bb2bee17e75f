"""The ingress over scripted decode replicas: placing, moving, late messages, patience, probes."""

import asyncio
from contextlib import aclosing

import pytest

from cluster.clock import VirtualClock
from serve.clients import Draining, ReplicaLost
from serve.directory import Directory, Entry
from serve.engine.sequence import Delta, Output, Sequence
from serve.errors import RequestError
from serve.ingress import MOST_FUTILE_MOVES, Ingress
from serve.prefixes import PlacedPrefixes
from serve.wire import Moved, pack, unpack
from tests.serving.tiny import request, run, until


class ScriptedDecode:
    """A decode replica that takes submissions and sends what the test tells it to."""

    def __init__(self):
        self.submitted = []  # sequences, under their call ids
        self.aborted = []
        self.pinged = []
        self.refuses = None
        self.takes = asyncio.Event()
        self.takes.set()
        self.outboxes = []  # one per reader
        self.ping_fails = None

    async def submit(self, payload, ingress_id):
        if self.refuses:
            raise self.refuses
        self.submitted.append(Sequence.from_bytes(payload))
        await self.takes.wait()

    async def abort(self, request_ids):
        self.aborted += request_ids
        return len(request_ids)

    async def tokens(self, ingress_id):
        outbox: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.outboxes.append(outbox)
        while (message := await outbox.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message

    async def ping(self, ingress_id=None):
        self.pinged.append(ingress_id)
        if self.ping_fails:
            raise self.ping_fails

    def send(self, *items):
        self.outboxes[-1].put_nowait(pack(items))

    def token(self, token, number=-1, finish=None):
        """Send the next token of a submission."""
        sequence = self.submitted[number]
        index = len(sequence.output)
        sequence.output.append(token)
        self.send(Output(sequence.request_id, index, Delta((token,), finish)))


class House:
    def __init__(self, *names, patience_s=10.0):
        self.replicas = {name: ScriptedDecode() for name in names}
        self.clock = VirtualClock()
        self.ingress = Ingress(
            "i",
            self.replicas.__getitem__,
            prefixes=PlacedPrefixes(page_tokens=4, pages=64),
            patience_s=patience_s,
            clock=self.clock,
        )
        self.version = 0
        self.tell(*names)

    def tell(self, *names, phase="ready"):
        self.version += 1
        entries = tuple(Entry(name, "decode", phase) for name in names)
        self.ingress.update(Directory(self.version, entries))

    def start(self, name="r", max_tokens=5):
        """A client that collects tokens."""

        async def client():
            one = request(name, [1, 2, 3], max_tokens)
            async with aclosing(self.ingress.generate(one)) as deltas:
                return [token async for delta in deltas for token in delta.token_ids]

        return asyncio.create_task(client())

    async def gone(self):
        """Nothing is kept of requests that ended."""
        await until(lambda: not self.ingress._background)
        assert not self.ingress._records and not self.ingress._placed
        assert not self.ingress._load_tokens


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


def test_tokens_come_through_and_nothing_is_kept():
    async def work():
        house = House("a")
        client = house.start()
        await turns()
        house.replicas["a"].token(7)
        house.replicas["a"].token(8, finish="stop")
        assert await client == [7, 8]
        await house.gone()
        assert house.replicas["a"].aborted == []

    run(work())


def test_a_moved_request_goes_on_from_what_was_delivered():
    async def work():
        house = House("a", "b")
        client = house.start()
        await turns()
        a, b = house.replicas["a"], house.replicas["b"]
        a.token(7)
        a.token(8)
        await turns()
        house.tell("b")
        await turns()
        assert b.submitted[0].output == [7, 8] and b.submitted[0].request.prompt == (1, 2, 3)
        a.token(99)  # late, from a replica that has been given up
        b.token(9, finish="length")
        assert await client == [7, 8, 9] and house.ingress.resumed == 1
        await house.gone()

    run(work())


def test_several_reasons_to_move_at_once_move_once():
    """A drained replica says Moved, its connection ends, and the directory drops it."""

    async def work():
        house = House("a", "b")
        client = house.start()
        await turns()
        a, b = house.replicas["a"], house.replicas["b"]
        a.token(7)
        await turns()
        house.tell("a", phase="draining")
        a.send(Moved(a.submitted[0].request_id))
        a.outboxes[-1].put_nowait(ReplicaLost("gone"))
        await turns()
        house.tell("b")
        await turns()
        assert len(b.submitted) == 1 and house.ingress.resumed == 1
        b.token(8, finish="length")
        assert await client == [7, 8]
        await house.gone()

    run(work())


def test_a_move_during_a_submission_is_not_placed_twice():
    async def work():
        house = House("a", "b")
        a, b = house.replicas["a"], house.replicas["b"]
        a.takes.clear()
        client = house.start()
        await turns()
        a.send(Moved(a.submitted[0].request_id))  # it began to drain while it took the request
        await turns()
        a.refuses = Draining("a takes nothing")
        a.takes.set()
        await turns()
        assert len(a.submitted) + len(b.submitted) == 2
        b.token(8, finish="length")
        assert await client == [8]
        await house.gone()

    run(work())


def test_tokens_may_arrive_before_the_answer_to_the_submission():
    async def work():
        house = House("a")
        a = house.replicas["a"]
        a.takes.clear()
        client = house.start()
        await turns()
        a.token(7)
        a.token(8, finish="stop")
        await turns()
        a.takes.set()
        assert await client == [7, 8]
        await house.gone()

    run(work())


def test_a_refusing_replica_is_passed_over():
    async def work():
        house = House("a", "b")
        house.replicas["a"].refuses = Draining("a takes no new requests")
        client = house.start()
        await turns()
        house.replicas["b"].token(8, finish="length")
        assert await client == [8]

    run(work())


def test_the_least_loaded_replica_takes_a_request():
    async def work():
        house = House("a", "b")
        clients = []
        for n in range(6):
            clients.append(house.start(f"r{n}"))
            await turns()
        assert [len(r.submitted) for r in house.replicas.values()] == [3, 3]
        for replica in house.replicas.values():
            for number in range(3):
                replica.token(1, number, finish="stop")
        assert await asyncio.gather(*clients) == [[1]] * 6
        await house.gone()

    run(work())


def test_without_a_replica_patience_ends_with_503():
    async def work():
        house = House(patience_s=10.0)
        client = house.start()
        await turns()
        assert not client.done()
        await house.clock.advance(11)
        with pytest.raises(RequestError, match="within 10 s") as told:
            await client
        assert told.value.status == 503 and told.value.retry_after_s
        await house.gone()

    run(work())


def test_a_replica_that_comes_in_time_takes_who_waits():
    async def work():
        house = House()
        house.replicas["late"] = ScriptedDecode()
        client = house.start()
        await turns()
        house.tell("late", phase="starting")
        await turns()
        assert house.replicas["late"].submitted == []
        house.tell("late")
        await turns()
        house.replicas["late"].token(3, finish="stop")
        assert await client == [3]

    run(work())


def test_a_request_that_ends_every_replica_is_given_up():
    """Else one poisonous request would take the whole service down again and again."""

    async def work():
        house = House("a")
        client = house.start()
        for _ in range(MOST_FUTILE_MOVES + 1):
            await turns(40)
            house.replicas["a"].send(Moved(house.replicas["a"].submitted[-1].request_id))
        with pytest.raises(RequestError, match="given up") as told:
            await client
        assert told.value.status == 500
        assert len(house.replicas["a"].submitted) == MOST_FUTILE_MOVES + 1
        await house.gone()

    run(work())


def test_moves_with_progress_in_between_may_go_on_for_ever():
    async def work():
        house = House("a")
        a, count = house.replicas["a"], 3 * MOST_FUTILE_MOVES
        client = house.start(max_tokens=100)
        for token in range(count):
            await turns(40)
            a.token(token)
            a.send(Moved(a.submitted[-1].request_id))
        await turns(40)
        a.token(count, finish="stop")
        assert await client == list(range(count + 1))

    run(work())


@pytest.mark.parametrize(
    "end,logged",
    [
        (lambda: None, ()),
        (lambda: ReplicaLost("gone"), ()),
        (lambda: ValueError("an odd one"), ("an odd one",)),
        (lambda: b"", ("Expecting value: line 1 column 1 (char 0)",)),
    ],
    ids=["ended", "lost", "odd", "spoilt"],
)
def test_a_connection_that_ends_in_any_way_moves_its_requests(end, logged):
    """The end of the stream without an error is how a replica says that it gave us up."""

    async def work():
        house = House("a")
        a = house.replicas["a"]
        client = house.start()
        await turns()
        a.token(7)
        await turns()
        a.outboxes[-1].put_nowait(end())
        await turns()
        assert not house.ingress._links and len(a.submitted) == 1
        house.tell("a")  # it is still there: a new connection, with a new name
        await until(lambda: len(a.submitted) == 2)
        first, second = a.submitted
        assert first.request_id != second.request_id and second.output == [7]
        a.send(Output(first.request_id, 1, Delta((99,))))  # left over from before
        a.token(8, finish="stop")
        assert await client == [7, 8]
        await house.gone()

    run(work(), expected=logged)


def test_a_skipped_token_is_never_passed_on():
    async def work():
        house = House("a")
        a = house.replicas["a"]
        client = house.start()
        await turns()
        a.token(7)
        a.send(Output(a.submitted[0].request_id, 2, Delta((9,))))
        await turns()
        house.tell("a")
        await until(lambda: len(a.submitted) == 2)
        assert a.submitted[1].output == [7]
        a.token(8)
        a.token(9, finish="stop")
        assert await client == [7, 8, 9]

    run(work(), expected=("a replica skipped a token",))


def test_a_ping_that_fails_ends_the_connection():
    async def work():
        house = House("a", "b")
        client = house.start()
        await turns()
        a, b = house.replicas["a"], house.replicas["b"]
        a.ping_fails = ReplicaLost("gone")
        await house.clock.advance(3)
        assert len(b.submitted) == 1 and b.pinged
        b.token(1, finish="stop")
        assert await client == [1]

    run(work())


@pytest.mark.parametrize("where", ["waiting for a replica", "submitting", "streaming"])
def test_a_client_that_leaves_aborts_its_work(where):
    async def work():
        house = House("a")
        a = house.replicas["a"]
        if where == "waiting for a replica":
            house.tell()
        if where == "submitting":
            a.takes.clear()
        client = house.start()
        await turns()
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        await house.gone()
        assert a.aborted == [s.request_id for s in a.submitted]
        assert len(a.submitted) == (where != "waiting for a replica")

    run(work())


def test_a_replica_that_does_not_answer_a_submission_is_passed_over(monkeypatch):
    monkeypatch.setattr("serve.ingress.ANSWER_S", 0.05)

    async def work():
        house = House("a", "b")
        a, b = house.replicas["a"], house.replicas["b"]
        a.takes.clear()
        client = house.start()
        await until(lambda: len(b.submitted) == 1)
        await turns()
        assert a.aborted == [a.submitted[0].request_id]  # it may have it all the same
        b.token(4, finish="stop")
        assert await client == [4]

    run(work())


def test_a_request_id_in_use_is_refused_without_harm_to_the_first():
    async def work():
        house = House("a")
        first = house.start("same")
        await turns()
        with pytest.raises(RequestError, match="already in use"):
            await house.start("same")
        house.replicas["a"].token(5, finish="stop")
        assert await first == [5]

    run(work())


def test_an_impossible_request_is_a_400():
    async def work():
        house = House("a")
        house.replicas["a"].refuses = ValueError("prompt and max_tokens together are too long")
        with pytest.raises(RequestError, match="too long") as told:
            await house.start()
        assert told.value.status == 400
        await house.gone()

    run(work())


def test_stop_ends_what_is_being_generated():
    async def work():
        house = House("a")
        client = house.start()
        await turns()
        await house.ingress.stop()
        with pytest.raises(RequestError) as told:
            await client
        assert told.value.status == 503

    run(work())


def test_a_probe_makes_a_token_or_says_no(monkeypatch):
    monkeypatch.setattr("serve.ingress.PROBE_S", 0.1)

    async def work():
        house = House("a")
        a = house.replicas["a"]
        assert await house.ingress.probe() is False  # it takes the request and makes nothing
        await turns()
        assert a.aborted == [a.submitted[0].request_id]
        probe = asyncio.create_task(house.ingress.probe())
        await turns()
        a.token(1, finish="length")
        assert await probe is True
        submitted = len(a.submitted)
        assert await house.ingress.probe() is True and len(a.submitted) == submitted, "just seen"
        await house.clock.advance(10)
        a.refuses = Draining("a")
        assert await house.ingress.probe() is False
        await house.gone()

    run(work())


def test_the_wire_carries_every_field():
    items: list[Output | Moved] = [
        Output("r", 3, Delta((1, 2), None, None, 4)),
        Output("é", 0, Delta((), "error", None, 0, "a sentence")),
        Output("s", 1, Delta((5,), "stop", "\n", 9)),
        Moved("m"),
    ]
    assert unpack(pack(items)) == items
    assert unpack(pack([])) == []
