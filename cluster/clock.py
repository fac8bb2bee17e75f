"""Time as a thing that is handed over: the wall clock, and a virtual one for tests and simulation.

Whoever waits or measures takes a Clock. `now_s` counts from an arbitrary start, never goes back,
and compares only with times of the same clock on the same machine.
"""

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What policy code may know of time."""

    def now_s(self) -> float:
        """Seconds since the clock's start; never decreases."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Return when `duration_s` have passed; zero or less gives others a turn and returns."""
        ...


class WallClock:
    """Real time (monotonic, unaffected by changes of the date)."""

    def now_s(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(max(0.0, duration_s))


class VirtualClock:
    """Time that passes only in `advance`, which wakes sleepers in the order of their waking times.

    Equal times wake in the order in which they went to sleep. One event loop, one thread.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, duration_s: float) -> None:
        if duration_s <= 0:
            await asyncio.sleep(0)
            return
        awake = asyncio.Event()
        entry = (self._now_s + duration_s, next(self._order), awake)
        heapq.heappush(self._sleepers, entry)
        try:
            await awake.wait()
        finally:
            if not awake.is_set():  # cancelled: leave nothing behind
                self._sleepers.remove(entry)
                heapq.heapify(self._sleepers)

    async def advance(self, duration_s: float) -> None:
        """Let `duration_s` pass; each sleeper runs at its own time and may sleep again."""
        assert duration_s >= 0, "time does not go back"
        end_s = self._now_s + duration_s
        await _let_others_run()
        while self._sleepers and self._sleepers[0][0] <= end_s:
            self._now_s, _, awake = heapq.heappop(self._sleepers)
            awake.set()
            await _let_others_run()
        self._now_s = end_s


async def _let_others_run(turns: int = 16) -> None:
    """Give woken tasks, and tasks those wake, the turns they need to reach their next sleep."""
    for _ in range(turns):
        await asyncio.sleep(0)
