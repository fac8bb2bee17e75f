"""The actuator over a controller and its launcher as they are, with scripted replicas."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from autoscale.loop.signals import RoleLoad
from autoscale.providers.served import Served
from cluster.clock import VirtualClock
from serve.backlog import Backlog
from serve.engine.sequence import Delta, Request
from serve.meter import Meter
from tests.serving.test_controller import STATS
from tests.serving.test_places import Placed
from tests.serving.tiny import request, run

DRAIN_S = 30.0


class Words:
    """A service that says so many tokens, each a second after the other."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        for number in range(request.limits.max_tokens):
            await self.clock.advance(1.0)
            last = number + 1 == request.limits.max_tokens
            yield Delta((7,), "length" if last else None)

    async def probe(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {}


def served(house: Placed) -> Served:
    meter = Meter(Words(VirtualClock()), VirtualClock())
    backlog = Backlog(10_000, 100, house.clock)
    return Served(house.controller, meter, backlog, DRAIN_S, house.clock)


def test_what_the_loop_sees_of_machines():
    async def work() -> None:
        async with Placed() as house:
            actuator = served(house)
            await actuator.set_replicas("decode", ["a", "b", "c"])
            assert (await actuator.signals()).ready == frozenset()
            await house.clock.advance(2)
            busy = replace(STATS, running=2, pages=8, free_pages=4, evictable_pages=2)
            house.launcher.answers[house.on("a")] = {"stats": busy}
            await house.clock.advance(2)
            house.launcher.drain_ends.clear()
            await actuator.drain("b", house.clock.now_s() + 7.5)
            seen = await actuator.signals()
            assert seen.roles == dict.fromkeys("abc", "decode")
            assert seen.ready == {"a", "c"} and seen.draining == {"b"}
            assert seen.idle == {"c"}, "one that drains may have got something just before"
            await house.clock.advance(0)
            assert house.launcher.drained == [(house.on("b"), 7.5)]
            assert seen.load["decode"].running == 2
            assert seen.load["decode"].kv_used == pytest.approx((0.25 + 0 + 0) / 3)
            house.launcher.drain_ends.set()
            await house.clock.advance(2)
            assert (await actuator.signals()).roles == dict.fromkeys("ac", "decode")

    run(work())


def test_replicas_that_are_wanted_no_more_have_their_time():
    async def work() -> None:
        async with Placed() as house:
            actuator = served(house)
            await actuator.set_replicas("decode", ["a", "b"])
            await house.clock.advance(2)
            out = house.on("a")
            await actuator.set_replicas("decode", ["b"])
            await house.clock.advance(2)
            assert house.launcher.drained == [(out, DRAIN_S)]
            assert house.phases() == {"b": "ready"}
            await actuator.drain("a", house.clock.now_s())
            await actuator.drain("nobody", house.clock.now_s())
            assert house.phases() == {"b": "ready"}
            with pytest.raises(ValueError, match="decode and prefill are served"):
                await actuator.set_replicas("training", ["b"])
            with pytest.raises(ValueError, match="no training job 'j'"):
                await actuator.yield_machine("j", "b")

    run(work())


def test_load_is_told_once():
    async def work() -> None:
        async with Placed() as house:
            actuator = served(house)
            clock = VirtualClock()
            actuator.meter = Meter(Words(clock), clock)
            for number, count in enumerate((3, 5)):
                asked = request(f"r{number}", list(range(10)), count)
                assert [d async for d in actuator.meter.generate(asked)]
            waiting = request("w", list(range(40)), 4)
            actuator.backlog.enter(waiting)
            load = (await actuator.signals()).load["decode"]
            assert load == RoleLoad(
                arrived_tokens=10 + 3 + 10 + 5,
                queued_tokens=40,
                running=0,
                kv_used=0.0,
                ttft_p90_s=1.0,
                tpot_p90_s=1.0,
            )
            again = (await actuator.signals()).load["decode"]
            assert (again.arrived_tokens, again.ttft_p90_s, again.queued_tokens) == (0, None, 40)

    run(work())


def test_prompts_are_prefills_work_where_there_is_one():
    async def work() -> None:
        async with Placed() as house:
            actuator = served(house)
            await actuator.set_replicas("decode", ["a"])
            await actuator.set_replicas("prefill", ["p"])
            await house.clock.advance(2)
            assert [d async for d in actuator.meter.generate(request("r", [1] * 20, 4))]
            load = (await actuator.signals()).load
            assert (load["decode"].arrived_tokens, load["prefill"].arrived_tokens) == (4, 20)
            assert (await actuator.signals()).roles == {"a": "decode", "p": "prefill"}

    run(work())


def test_answers_are_expected_as_long_as_they_were():
    """Not as long as they might become: most end long before their limit."""

    class Short(Words):
        async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
            yield Delta((7,) * 8, "stop")

    async def work() -> None:
        meter = Meter(Short(VirtualClock()), VirtualClock())
        for number in range(60):
            assert [d async for d in meter.generate(request(f"r{number}", [1], 4000))]
        meter.take()
        assert [d async for d in meter.generate(request("last", [1], 4000))]
        assert meter.take().answer_tokens == 8

    run(work())
