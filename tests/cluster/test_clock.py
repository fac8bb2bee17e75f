"""The virtual clock wakes sleepers in order of time and moves only when told."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cluster.clock import Clock, VirtualClock, WallClock


@given(st.lists(st.floats(0.001, 1e6), max_size=20), st.floats(0, 1e6))
def test_sleepers_wake_in_order_at_their_time(durations_s: list[float], until_s: float):
    async def story() -> list[tuple[float, float]]:
        clock = VirtualClock()
        woken: list[tuple[float, float]] = []

        async def sleeper(duration_s: float) -> None:
            await clock.sleep(duration_s)
            woken.append((duration_s, clock.now_s()))

        tasks = [asyncio.create_task(sleeper(duration_s)) for duration_s in durations_s]
        await clock.advance(until_s)
        assert clock.now_s() == until_s
        for task in tasks:
            task.cancel()
        return woken

    woken = asyncio.run(story())
    expected = sorted(duration_s for duration_s in durations_s if duration_s <= until_s)
    assert woken == [(duration_s, duration_s) for duration_s in expected]


def test_a_loop_ticks_once_a_period():
    """A sleeper that sleeps again is woken at each of its times, not once per advance."""

    async def story() -> list[float]:
        clock = VirtualClock(start_s=100.0)
        ticks: list[float] = []

        async def loop() -> None:
            while True:
                await clock.sleep(2)
                ticks.append(clock.now_s())

        task = asyncio.create_task(loop())
        await clock.advance(7)
        task.cancel()
        return ticks

    assert asyncio.run(story()) == [102.0, 104.0, 106.0]


def test_a_cancelled_sleeper_leaves_nothing():
    async def story() -> None:
        clock = VirtualClock()
        task = asyncio.create_task(clock.sleep(1))
        other = asyncio.create_task(clock.sleep(2))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        await clock.advance(3)
        assert task.cancelled() and other.done() and not other.cancelled()

    asyncio.run(story())


def test_no_time_passes_for_a_sleep_of_zero():
    async def story(clock: Clock) -> float:
        before_s = clock.now_s()
        await clock.sleep(0)
        await clock.sleep(-1)
        return clock.now_s() - before_s

    assert asyncio.run(story(VirtualClock())) == 0
    assert asyncio.run(story(WallClock())) >= 0


def test_the_wall_clock_waits_at_least_as_long_as_asked():
    async def story() -> float:
        clock = WallClock()
        before_s = clock.now_s()
        await clock.sleep(0.02)
        return clock.now_s() - before_s

    assert asyncio.run(story()) >= 0.019
