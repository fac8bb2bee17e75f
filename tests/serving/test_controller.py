"""The controller over a scripted launcher: replacement, back-off, scaling, draining, restart.

Time between looks is virtual; only what a hung replica is given to answer is real, and short.
"""

import asyncio
from collections import Counter
from typing import Any, cast

import pytest

from cluster.clock import VirtualClock
from serve.clients import ReplicaLost
from serve.controller import STEADY_S, Controller, Patience
from serve.directory import Directory
from serve.engine.stats import EngineStats
from serve.state import ReplicaState, Role
from tests.serving.tiny import run, until

STATS = EngineStats(0, 0, 0, 0, 8, 8, 0, 0, 0, 0, 0, 0, 0)
PATIENCE = Patience(period_s=1.0, ping_deadline_s=0.05, start_deadline_s=0.05)
HUNG = "hung"


class ScriptedLauncher:
    """Replicas that answer as told. `answers[id]`: an exception, HUNG, or fields of the state."""

    def __init__(self):
        self.alive = {}
        self.answers = {}
        self.fails_to_start = {}  # role -> exception
        self.fails_to_stop = None
        self.started, self.stopped, self.drained = [], [], []
        self.drain_ends = asyncio.Event()
        self.drain_ends.set()
        self.start_takes = asyncio.Event()
        self.start_takes.set()

    async def start(self, role, replica_id):
        self.started.append(replica_id)
        await self.start_takes.wait()
        if role in self.fails_to_start:
            raise self.fails_to_start[role]
        self.alive[replica_id] = role

    async def ping(self, replica_id):
        answer = self.answers.get(replica_id, {})
        if answer == HUNG:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        if replica_id not in self.alive:
            raise ReplicaLost(f"{replica_id} is gone")
        role = self.alive[replica_id]
        blank = ReplicaState(replica_id, role, None, 0.0, False, 0, 0, 0, 0, STATS)
        return ReplicaState(**{**vars(blank), **answer})

    async def drain(self, replica_id, deadline_s):
        self.drained.append((replica_id, deadline_s))
        await self.drain_ends.wait()
        return 0

    async def stop(self, replica_id):
        self.stopped.append(replica_id)
        self.alive.pop(replica_id, None)
        if self.fails_to_stop:
            raise self.fails_to_stop

    async def running(self):
        return dict(self.alive)


class House:
    """A controller, its launcher and the clock; every directory version it published."""

    def __init__(self, launcher=None, prefill=1, decode=2):
        self.launcher = launcher or ScriptedLauncher()
        self.clock = VirtualClock()
        wanted: dict[Role, int] = {"prefill": prefill, "decode": decode}
        self.controller = Controller(self.launcher, wanted, PATIENCE, self.clock)

    async def __aenter__(self):
        await self.controller.start()
        await self.clock.advance(0)
        return self

    async def __aexit__(self, *_):
        await self.controller.stop()

    def phases(self, role="decode"):
        entries = self.controller.directory().entries
        return {e.replica_id: e.phase for e in entries if e.role == role}

    def ready(self, role="decode"):
        return sorted(e.replica_id for e in self.controller.directory().ready(role))


def test_starts_what_is_wanted_and_stops_all():
    async def work():
        async with House() as house:
            assert len(house.ready("decode")) == 2 and len(house.ready("prefill")) == 1
            started = list(house.launcher.started)
            assert len(set(started)) == 3
        assert sorted(house.launcher.stopped) == sorted(started)
        assert house.launcher.alive == {}
        await house.clock.advance(100)
        assert house.launcher.started == started

    run(work())


@pytest.mark.parametrize(
    "answer,said",
    [
        (ReplicaLost("killed"), "killed"),
        (RuntimeError("an odd error of a shell"), "an odd error of a shell"),
        ({"failure": "the engine has stopped: ValueError: x"}, "ValueError: x"),
        ({"silent_s": 1e9}, "no step"),
        (HUNG, "did not answer within 0.05 s"),
    ],
    ids=["dead", "odd", "failed", "silent", "hung"],
)
def test_a_replica_that_can_serve_no_more_is_replaced(answer, said):
    async def work():
        async with House() as house:
            victim, other = house.ready()
            house.launcher.answers[victim] = answer
            house.launcher.start_takes.clear()
            await house.clock.advance(1)
            if answer == HUNG:
                await until(lambda: victim not in house.phases())
                await house.clock.advance(0)
            assert victim in house.launcher.stopped and victim not in house.phases()
            assert other in house.ready() and len(house.phases()) == 2
            assert said in house.controller.directory().trouble
            house.launcher.start_takes.set()
            await house.clock.advance(2)
            assert len(house.ready()) == 2
            assert house.controller.directory().trouble is None, "it is told for ever"

    run(work())


def test_an_engine_that_takes_long_for_a_step_is_left_alone():
    async def work():
        async with House() as house:
            house.launcher.answers[house.ready()[0]] = {"silent_s": 2 * PATIENCE.ping_deadline_s}
            before = house.ready()
            await house.clock.advance(10)
            assert house.ready() == before

    run(work())


@pytest.mark.parametrize("how", ["start raises", "ping fails"])
def test_a_role_that_keeps_failing_is_tried_later_and_later(how):
    async def work():
        launcher: Any = ScriptedLauncher()

        async def lost(replica_id):
            raise ReplicaLost("the weights are missing")

        if how == "start raises":
            launcher.fails_to_start["prefill"] = ValueError("no room")
        else:
            answer = launcher.ping
            launcher.ping = lambda r: lost(r) if r.startswith("prefill") else answer(r)
        async with House(launcher) as house:
            assert len(house.ready("decode")) == 2, "one role's trouble is not the other's"
            tries = lambda: sum(name.startswith("prefill") for name in launcher.started)  # noqa: E731
            assert tries() == 2  # at once, and once more at once
            await house.clock.advance(60)
            early = tries() - 2
            assert 4 <= early <= 7
            await house.clock.advance(300)
            assert 9 <= tries() - 2 - early <= 11  # twice a minute
            assert house.controller.directory().trouble
            # Hours of it: the waits must not overflow, and the end of the trouble is noticed.
            house.controller._failures["prefill"] = 5000
            await house.clock.advance(100)
            launcher.fails_to_start.clear()
            launcher.ping = ScriptedLauncher.ping.__get__(launcher)
            await house.clock.advance(61)
            assert len(house.ready("prefill")) == 1

    run(work())


def test_one_failure_after_a_long_service_is_made_good_at_once():
    async def work():
        async with House() as house:
            for _ in range(4):
                await house.clock.advance(STEADY_S + 1)
                started = len(house.launcher.started)
                house.launcher.alive.pop(house.ready()[0])
                await house.clock.advance(1)
                assert len(house.launcher.started) == started + 1 and len(house.phases()) == 2

    run(work())


def test_a_launcher_that_cannot_stop_a_replica_does_not_prevent_the_next():
    async def work():
        async with House() as house:
            house.launcher.fails_to_stop = OSError("no permission")
            victim = house.ready()[0]
            house.launcher.alive.pop(victim)
            await house.clock.advance(2)
            assert len(house.ready()) == 2 and victim not in house.ready()
            house.launcher.fails_to_stop = None

    run(work())


def test_slow_starts_in_parallel_do_not_overshoot():
    """Several tasks that find replicas missing at the same time start each of them once."""

    async def work():
        launcher = ScriptedLauncher()
        launcher.start_takes.clear()
        house = House(launcher, prefill=0, decode=3)
        starts = [asyncio.create_task(house.controller._fill()) for _ in range(4)]
        await house.clock.advance(0)
        launcher.start_takes.set()
        await asyncio.gather(*starts)
        await house.clock.advance(1)
        assert len(launcher.started) == 3 == len(house.ready())
        await house.controller.stop()

    run(work())


def test_scaling_up_and_down():
    async def work():
        async with House() as house:
            first = house.ready()
            await house.controller.scale("decode", 4, 5.0)
            await house.clock.advance(1)
            assert len(house.ready()) == 4
            house.launcher.drain_ends.clear()
            await house.controller.scale("decode", 1, 7.0)
            # Out of routing at once, before the background has done anything.
            assert house.ready() == first[:1]
            await house.controller.scale("decode", 1, 7.0)
            await house.clock.advance(1)
            assert Counter(d for _, d in house.launcher.drained) == {7.0: 3}
            house.launcher.drain_ends.set()
            await house.clock.advance(1)
            assert house.phases() == {first[0]: "ready"}
            assert sorted(house.launcher.alive) == sorted([*house.ready(), *house.ready("prefill")])

    run(work())


def test_a_drained_replica_is_replaced_first():
    async def work():
        async with House() as house:
            leaving, stays = house.ready()
            house.launcher.drain_ends.clear()
            task = asyncio.create_task(house.controller.drain(leaving, 9.0))
            await house.clock.advance(2)
            assert house.phases()[leaving] == "draining" and leaving in house.launcher.alive
            assert len(house.ready()) == 2 and stays in house.ready()
            house.launcher.drain_ends.set()
            await task
            assert leaving in house.launcher.stopped and leaving not in house.phases()

    run(work())


@pytest.mark.parametrize("how", ["lost", "odd", "too long"])
def test_a_drain_that_fails_still_ends(how):
    async def work():
        async with House() as house:
            leaving, launcher = house.ready()[0], cast(Any, house.launcher)

            async def drain(replica_id, deadline_s):
                if how == "too long":
                    await asyncio.Event().wait()
                raise ReplicaLost("gone") if how == "lost" else RuntimeError("odd")

            launcher.drain = drain
            await house.controller.drain(leaving, 0.01)
            assert leaving in house.launcher.stopped and leaving not in house.phases()
            await house.clock.advance(1)
            assert len(house.ready()) == 2

    run(work())


def test_a_replica_lost_while_it_drains_is_removed_once():
    async def work():
        async with House() as house:
            leaving = house.ready()[0]
            house.launcher.drain_ends.clear()
            task = asyncio.create_task(house.controller.drain(leaving, 9.0))
            await house.clock.advance(1)
            house.launcher.alive.pop(leaving)
            await house.clock.advance(1)
            house.launcher.drain_ends.set()
            await task
            await house.clock.advance(1)
            assert len(house.ready()) == 2 and len(house.phases()) == 2

    run(work())


def test_a_stranger_cannot_be_drained():
    async def work():
        async with House() as house:
            with pytest.raises(ValueError, match="'nobody'; running are: decode-"):
                await house.controller.drain("nobody", 1.0)

    run(work())


def test_a_restarted_controller_goes_on_with_what_runs():
    async def work():
        first = House()
        await first.controller.start()
        await first.clock.advance(3)
        version = first.controller.directory().version
        running = dict(first.launcher.alive)
        for task in first.controller._watchers.values():
            task.cancel()  # it crashed
        async with House(first.launcher) as second:
            assert first.launcher.alive == running and len(first.launcher.started) == 3
            assert sorted(second.ready()) == sorted(first.ready())
            # Whoever knew the first one's version is not told an older one.
            known = await second.controller.watch(version, 5.0)
            assert isinstance(known, Directory) and known.version > version
            await second.controller.scale("decode", 3, 1.0)
            await second.clock.advance(1)
            assert len(second.ready()) == 3

    run(work())


def test_a_restarted_controller_finishes_a_drain_that_was_under_way():
    async def work():
        launcher = ScriptedLauncher()
        launcher.alive = {"decode-7": "decode", "prefill-1": "prefill"}
        launcher.answers["decode-7"] = {"draining": True}
        async with House(launcher, decode=1) as house:
            await house.clock.advance(2)
            assert "decode-7" in launcher.stopped
            assert house.ready() != ["decode-7"] and len(house.ready()) == 1

    run(work())


def test_versions_only_grow_and_watchers_hear_of_every_change():
    async def work():
        async with House() as house:
            versions = [house.controller.directory().version]
            waiting = [
                asyncio.create_task(house.controller.watch(versions[0], 30.0)) for _ in range(3)
            ]
            await asyncio.sleep(0)
            await house.controller.scale("decode", 3, 1.0)
            for heard in await asyncio.gather(*waiting):
                assert heard.version > versions[0]
            for _ in range(5):
                versions.append((await house.controller.watch(-1, 1.0)).version)
                await house.clock.advance(1)
            assert versions == sorted(versions)
            now = house.controller.directory().version
            assert (await house.controller.watch(now, 0.01)).version == now

    run(work())


def test_a_watcher_that_gives_up_disturbs_nobody():
    async def work():
        async with House() as house:
            version = house.controller.directory().version
            patient = asyncio.create_task(house.controller.watch(version, 30.0))
            hasty = asyncio.create_task(house.controller.watch(version, 30.0))
            await asyncio.sleep(0)
            hasty.cancel()
            await asyncio.sleep(0)
            assert not patient.done()
            await house.controller.scale("decode", 3, 1.0)
            assert (await patient).version > version

    run(work())
