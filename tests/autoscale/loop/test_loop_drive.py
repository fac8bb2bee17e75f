"""The driver on a virtual clock: its periods, its deadlines, and what a defect in a step costs."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from autoscale.loop.drive import Driver, in_time, role_of
from autoscale.loop.step import Loop
from autoscale.spot.basic import OnDemandPolicy, Refusals
from cluster.clock import VirtualClock
from tests.autoscale.loop.plant import Cloud, Kept, Pool, Served, offer
from tests.autoscale.loop.plant import settings as made


class Shared:
    """What the plant reads of a stepped clock, on a virtual one."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    @property
    def time_s(self) -> float:
        return self.clock.now_s()


def driver(clock: VirtualClock) -> tuple[Driver, Cloud, Served, Kept]:
    cloud = Cloud(Shared(clock), [offer()])  # type: ignore[arg-type]
    service = Served(cloud, {"decode": Pool(lambda at_s: 50.0)})
    loop, kept = Loop(made(), OnDemandPolicy(), Refusals(), "t"), Kept()
    return Driver(cloud, service, loop, clock, kept), cloud, service, kept


async def run_for(made: Driver, clock: VirtualClock, duration_s: float) -> None:
    stop = asyncio.Event()
    running = asyncio.ensure_future(made.run(stop))
    await clock.advance(duration_s)
    stop.set()
    await clock.advance(0.0)
    await asyncio.wait_for(running, 5.0)


def test_a_step_each_period_and_a_hanging_call_takes_its_deadline_and_no_more():
    clock = VirtualClock()
    under, cloud, service, kept = driver(clock)
    cloud.faults["offers"] = ["hangs"]

    async def going() -> None:
        service.pools["decode"].arrived = 1.0
        await run_for(under, clock, 205.0)

    asyncio.run(going())
    times = [signals.now_s for signals, _ in kept.steps]
    assert times[0] == 10.0  # the deadline, and no offers
    assert times[1:4] == [20.0, 40.0, 60.0] and len(times) in (10, 11)
    assert kept.steps[0][0].offers == () and kept.steps[1][0].offers != ()
    assert service.answering("decode") >= 1
    assert clock._sleepers == []


def test_a_defect_in_one_step_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch):
    clock = VirtualClock()
    under, _, service, kept = driver(clock)
    once, calls = under.once, []

    async def breaks() -> Any:
        calls.append(clock.now_s())
        if len(calls) == 2:
            raise KeyError("a defect")
        return await once()

    monkeypatch.setattr(under, "once", breaks)
    asyncio.run(run_for(under, clock, 150.0))
    assert calls[:4] == [0.0, 20.0, 40.0, 60.0] and len(kept.steps) == len(calls) - 1
    assert service.answering("decode") >= 1


def test_without_the_machines_nothing_is_decided():
    clock = VirtualClock()
    under, cloud, _, kept = driver(clock)
    cloud.faults["machines"] = ["fails", "hangs"]
    assert asyncio.run(under.once()) is None and kept.steps == []

    async def again() -> None:
        step: Coroutine[Any, Any, Any] = under.once()
        waiting = asyncio.ensure_future(step)
        await clock.advance(10.0)
        assert await waiting is None
        await clock.advance(1.0)
        assert await under.once() is not None

    asyncio.run(again())
    assert len(kept.steps) == 1 and cloud.launches == 1


def test_in_time_passes_on_what_a_call_returns_or_raises_and_cancels_what_is_late():
    clock, ended = VirtualClock(), []

    async def slow(after_s: float) -> str:
        try:
            await clock.sleep(after_s)
            return "done"
        finally:
            ended.append(clock.now_s())

    async def going() -> None:
        waiting = asyncio.ensure_future(in_time(clock, 10.0, slow(4.0)))
        await clock.advance(4.0)
        assert await waiting == "done"
        late = asyncio.ensure_future(in_time(clock, 10.0, slow(60.0)))
        await clock.advance(10.0)
        with pytest.raises(TimeoutError, match="10 s"):
            await late
        await asyncio.sleep(0)
        assert ended == [4.0, 14.0]

    asyncio.run(going())
    assert clock._sleepers == []


@pytest.mark.parametrize(
    ("token", "role"),
    [("decode/a/1", "decode"), ("prefill/b/9", "prefill"), ("decode", ""), ("job/1", ""), ("", "")],
)
def test_a_token_tells_the_role(token: str, role: str):
    assert role_of(token) == role
