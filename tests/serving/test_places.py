"""The controller over named machines: one replica on each that is named, none elsewhere; a machine
that fails holds up no other, and one that is given up is nobody's failure."""

import asyncio

from cluster.clock import VirtualClock
from serve.clients import ReplicaLost
from serve.controller import LONGEST_BACKOFF_S, Controller
from serve.places import machine_of, on_machine
from tests.serving.test_controller import PATIENCE, ScriptedLauncher
from tests.serving.tiny import run


class Placed:
    """A controller that counts no replicas, its launcher and the clock."""

    def __init__(self, launcher=None):
        self.launcher = launcher or ScriptedLauncher()
        self.clock = VirtualClock()
        self.controller = Controller(
            self.launcher, {"prefill": 0, "decode": 0}, PATIENCE, self.clock
        )

    async def __aenter__(self):
        await self.controller.start()
        await self.clock.advance(0)
        return self

    async def __aexit__(self, *_):
        await self.controller.stop()

    def phases(self):
        return {
            machine_of(entry.replica_id): entry.phase
            for entry in self.controller.directory().entries
        }

    def on(self, machine):
        """The replica there."""
        found = [r for r in self.launcher.alive if machine_of(r) == machine]
        assert len(found) == 1, found
        return found[0]


def test_a_replica_on_each_machine_and_none_elsewhere():
    async def work():
        async with Placed() as house:
            await house.controller.place("decode", ["a", "b"])
            await house.clock.advance(2)
            assert house.phases() == {"a": "ready", "b": "ready"}
            assert house.launcher.alive == {house.on("a"): "decode", house.on("b"): "decode"}
            before = house.on("b")
            await house.controller.place("decode", ["b", "c", "c"])
            await house.clock.advance(2)
            assert house.phases() == {"b": "ready", "c": "ready"}
            assert house.on("b") == before
            assert sorted(map(machine_of, house.launcher.alive)) == ["b", "c"]
            await house.controller.place("decode", [])
            await house.clock.advance(2)
            assert house.launcher.alive == {} and house.phases() == {}

    run(work())


def test_a_machine_that_is_left_gets_nothing_new():
    """Also while its replica drains, and when it dies in the middle of that."""

    async def work():
        async with Placed() as house:
            await house.controller.place("decode", ["a", "b"])
            await house.clock.advance(2)
            house.launcher.drain_ends.clear()
            await house.controller.place("decode", ["b"], drain_s=30.0)
            await house.controller.leave("a", 7.0)
            assert house.phases() == {"a": "draining", "b": "ready"}
            await house.controller.place("decode", ["b", "c"])
            await house.clock.advance(2)
            assert house.phases() == {"a": "draining", "b": "ready", "c": "ready"}
            a = house.on("a")
            assert house.launcher.drained == [(a, 30.0), (a, 7.0)], "it may be told to hurry"
            house.launcher.answers[a] = ReplicaLost("SIGKILL")
            started = len(house.launcher.started)
            await house.clock.advance(2 * LONGEST_BACKOFF_S)
            assert house.phases() == {"b": "ready", "c": "ready"}
            assert len(house.launcher.started) == started
            assert house.controller.replaced == 0

    run(work())


def test_a_machine_that_is_named_again_gets_a_replica_once_it_is_empty():
    async def work():
        async with Placed() as house:
            await house.controller.place("decode", ["a"])
            await house.clock.advance(2)
            first = house.on("a")
            house.launcher.drain_ends.clear()
            await house.controller.leave("a", 7.0)
            await house.controller.place("decode", ["a"])
            await house.clock.advance(2)
            assert list(house.launcher.alive) == [first]
            house.launcher.drain_ends.set()
            await asyncio.sleep(0)
            await house.controller.place("decode", ["a"])
            await house.clock.advance(2)
            assert house.phases() == {"a": "ready"} and house.on("a") != first

    run(work())


def test_a_machine_that_fails_holds_up_no_other():
    class Broken(ScriptedLauncher):
        async def start(self, role, replica_id):
            self.started.append(replica_id)
            if machine_of(replica_id) == "bad":
                raise ReplicaLost("no such machine")
            self.alive[replica_id] = role

    async def work():
        async with Placed(Broken()) as house:
            await house.controller.place("decode", ["bad"])
            await house.clock.advance(20)
            tried = len(house.launcher.started)
            assert 3 <= tried <= 7, "later and later"
            await house.controller.place("decode", ["bad", "good"])
            assert machine_of(house.launcher.started[-1]) == "good"
            await house.clock.advance(2)
            assert house.phases() == {"good": "ready"}

    run(work())


def test_a_lost_replica_of_a_named_machine_is_started_there_again():
    async def work():
        async with Placed() as house:
            await house.controller.place("decode", ["a", "b"])
            await house.clock.advance(2)
            lost = house.on("a")
            house.launcher.alive.pop(lost)
            await house.clock.advance(2)
            assert house.phases() == {"a": "ready", "b": "ready"} and house.on("a") != lost
            assert house.controller.replaced == 1

    run(work())


def test_a_controller_that_comes_back_knows_where_replicas_are():
    async def work():
        launcher = ScriptedLauncher()
        launcher.alive = {"decode-1.a": "decode", "decode-2.b": "decode"}
        async with Placed(launcher) as house:
            await house.clock.advance(2)
            assert house.phases() == {"a": "ready", "b": "ready"} and launcher.started == []
            await house.controller.place("decode", ["b", "c"])
            await house.clock.advance(2)
            assert sorted(map(machine_of, launcher.alive)) == ["b", "c"]
            assert house.on("b") == "decode-2.b"

    run(work())


def test_ids():
    assert machine_of(on_machine("decode-3", "m-7")) == "m-7"
    assert (on_machine("decode-3", ""), machine_of("decode-3")) == ("decode-3", "")
