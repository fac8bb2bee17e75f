"""The requests that a decode replica has: whose each is, and what their ingresses are told.

A request is here from `add` until its last output, an abort, or its departure; whatever the engine
says of it later is dropped. Everything runs on the replica's event loop. Used by decode.py and,
when the replica drains, by migrate/depart.py.
"""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cluster.clock import Clock
from serve.channels import Channels
from serve.engine.loop import EngineLoop
from serve.engine.sequence import Output, Parked
from serve.replica import between_steps
from serve.wire import Moved


@dataclass(eq=False)
class Job:
    """A request that is here: whose it is, and what is under way to start it, if anything is."""

    ingress_id: str
    group: str = ""
    starting: asyncio.Task[None] | None = None


class Jobs:
    """By request id; iterating gives the ids. `freed` is set whenever pages may have come free."""

    def __init__(self, loop: EngineLoop, clock: Clock) -> None:
        self.loop = loop
        self.clock = clock
        self.channels = Channels()
        self.freed = asyncio.Event()
        self._jobs: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def get(self, request_id: str) -> Job | None:
        return self._jobs.get(request_id)

    def add(self, request_id: str, ingress_id: str, group: str) -> None:
        """ValueError when the id is here already."""
        if request_id in self._jobs:
            raise ValueError(f"request {request_id} is already here")
        self._jobs[request_id] = Job(ingress_id, group)

    def siblings(self, request_id: str) -> list[Job]:
        """The other jobs of the same group that are here now."""
        mine = self._jobs[request_id]
        return [job for job in self._jobs.values() if job.group == mine.group and job is not mine]

    def starting(self) -> list[asyncio.Task[None]]:
        """What is under way to start any of them."""
        return [job.starting for job in self._jobs.values() if job.starting is not None]

    def drop(self, request_ids: Collection[str]) -> dict[str, Job]:
        """Forget those that are here and have the engine drop their sequences before its next step.

        At once, so that a job cannot take another step in between; what a hand-off under way has
        with another replica, its own cleanup ends. Returns what was dropped.
        """
        dropped = {r: self._jobs.pop(r) for r in request_ids if r in self._jobs}
        for job in dropped.values():
            if job.starting is not None:
                job.starting.cancel()
        self.loop.call(lambda engine: [engine.abort(request_id) for request_id in dropped])
        return dropped

    async def abort(self, request_ids: Collection[str]) -> dict[str, Job]:
        """As `drop`; the engine has done it when this returns."""
        dropped = self.drop(request_ids)
        await between_steps(self.loop, lambda _: None)
        self.freed.set()
        return dropped

    async def send_away(self, request_ids: Collection[str]) -> int:
        """Drop requests and have their ingresses go on elsewhere, without their KV; how many."""
        dropped = await self.abort(request_ids)
        self._tell_moved(dropped)
        return len(dropped)

    def lose_all(self) -> None:
        """The engine has died: everything goes on elsewhere."""
        self._tell_moved(self.drop(list(self._jobs)))

    def leave(self, request_id: str, parked: Parked) -> None:
        """A parked request goes on elsewhere, with its KV; nothing if it was aborted meanwhile."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._send(job.ingress_id, [Moved(request_id, parked)])

    def route(self, outputs: list[Output]) -> None:
        """Sort a step's outputs by ingress; whoever was aborted meanwhile is dropped here."""
        by_ingress: dict[str, list[Output | Moved]] = defaultdict(list)
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            by_ingress[job.ingress_id].append(output)
            if output.delta.finish is not None:
                del self._jobs[output.request_id]
                self.freed.set()
        for ingress_id, batch in by_ingress.items():
            self._send(ingress_id, batch)

    def forget_silent(self, silent_s: float) -> None:
        """Drop the jobs of ingresses not heard for so long: nobody is left to read their tokens."""
        for ingress_id in self.channels.close_silent(self.clock.now_s() - silent_s):
            self.drop([r for r, job in self._jobs.items() if job.ingress_id == ingress_id])
            self.freed.set()

    def _tell_moved(self, dropped: dict[str, Job]) -> None:
        for request_id, job in dropped.items():
            self._send(job.ingress_id, [Moved(request_id)])

    def _send(self, ingress_id: str, items: list[Output | Moved]) -> None:
        self.channels.send(ingress_id, items, self.clock.now_s())


async def first_started(jobs: list[Job]) -> None:
    """Wait until the first of those that are being started has been."""
    waiting = [job.starting for job in jobs if job.starting and not job.starting.done()]
    if waiting:
        await asyncio.wait(waiting[:1])
