"""The process that runs the control loop over a real service: `sanderling autoscale`.

Several may run; the one that leads decides. Whether it still does is asked again right before
anything is done, and every launch is known by a token that names the leader and its term, so that a
leader that was asleep and wakes up buys nothing.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Decision
from autoscale.loop.actuator import Actuator, Service
from autoscale.loop.drive import Driver, Log
from autoscale.loop.step import Loop
from autoscale.providers.provider import Machine, Provider
from autoscale.spot.events import SpotEvent
from cluster.clock import Clock
from cluster.settings.autoscale import AutoscaleSettings

LOG = logging.getLogger(__name__)
FOLLOW_S = 1.0  # how often one that follows looks whether it leads


class NotLeading(Exception):
    """Somebody else decides now."""


class Leading(Protocol):
    """See kubernetes.lease.Election. term: grows with every new leader."""

    me: str
    term: int

    def leads(self) -> bool: ...

    async def run(self, stop: asyncio.Event) -> None: ...


@dataclass
class Alone:
    """Where nobody else can lead. me: never the same for two runs."""

    me: str
    term: int = 0

    def leads(self) -> bool:
        return True

    async def run(self, stop: asyncio.Event) -> None:
        await stop.wait()


class Fenced:
    """A provider that changes nothing for one that does not lead; also notes what it was told."""

    def __init__(self, inner: Provider, election: Leading) -> None:
        self.inner, self.election = inner, election
        self.known: tuple[Machine, ...] = ()

    async def offers(self) -> Sequence[Offer]:
        return await self.inner.offers()

    async def launch(self, offer: Offer, token: str) -> Machine:
        _only(self.election)
        return await self.inner.launch(offer, token)

    async def terminate(self, machine_id: str) -> None:
        _only(self.election)
        await self.inner.terminate(machine_id)

    async def machines(self) -> Sequence[Machine]:
        _only(self.election)
        self.known = tuple(await self.inner.machines())
        return self.known

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        _only(self.election)
        return await self.inner.events(cursor)


class FencedService:
    """An actuator that changes nothing for one that does not lead."""

    def __init__(self, inner: Actuator, election: Leading) -> None:
        self.inner, self.election = inner, election

    async def signals(self) -> Service:
        return await self.inner.signals()

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        _only(self.election)
        await self.inner.set_replicas(role, machine_ids)

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        _only(self.election)
        await self.inner.drain(machine_id, deadline_s)

    async def yield_machine(self, job: str, machine_id: str) -> None:
        _only(self.election)
        await self.inner.yield_machine(job, machine_id)

    async def return_machine(self, job: str, machine_id: str) -> None:
        _only(self.election)
        await self.inner.return_machine(job, machine_id)


def _only(election: Leading) -> None:
    if not election.leads():
        raise NotLeading(f"{election.me} leads no more")


@dataclass
class Progress:
    """What /healthz and /metrics tell. looked_s: when anything was last done."""

    looked_s: float
    steps: int = 0
    undecided: int = 0
    terms: int = 0
    actions: dict[str, int] = field(default_factory=dict)


class Controller:
    """make: the loop of a name, made anew for each term, for a new leader knows nothing but what
    is there. woken: set by whoever has seen something that cannot wait for the next period."""

    def __init__(
        self,
        provider: Provider,
        actuator: Actuator,
        election: Leading,
        make: Callable[[str], Loop],
        settings: AutoscaleSettings,
        clock: Clock,
        log: Log | None = None,
    ) -> None:
        self.provider = Fenced(provider, election)
        self.actuator = FencedService(actuator, election)
        self.election, self.settings, self.clock = election, settings, clock
        self.woken = asyncio.Event()
        self.progress = Progress(clock.now_s())
        self._make, self._log = make, log
        self._driver: Driver | None = None
        self._term, self._seen = -1, False

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then the lease is given back."""
        electing = asyncio.ensure_future(self.election.run(stop))
        try:
            while not stop.is_set():
                begun_s = self.clock.now_s()
                leads = self.election.leads()
                if leads:
                    await self.once()
                else:
                    self._driver = None
                self.progress.looked_s = self.clock.now_s()
                rest_s = self.settings.period_s - (self.clock.now_s() - begun_s)
                await self._rest(stop, max(0.001, rest_s) if leads else FOLLOW_S)
        finally:
            stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await electing

    async def once(self) -> Decision | None:
        """One step of the loop; None where nothing could be decided."""
        if self._driver is None or self._term != self.election.term:
            self._term, self._seen = self.election.term, False
            self.progress.terms += 1
            loop = self._make(f"{self.election.me}-{self._term}")
            LOG.info("%s leads, term %d", self.election.me, self._term)
            self._driver = Driver(self.provider, self.actuator, loop, self.clock, self._log)
        self.woken.clear()
        decision = None
        try:
            if not self._seen:
                # The service speaks of machines by names that only the listing explains; without
                # it, a new leader would take every replica for missing and buy for it.
                await self.provider.machines()
                self._seen = True
            decision = await self._driver.once()
        except Exception:  # a defect of one step must not end all of them
            LOG.exception("a step of the control loop failed")
        self.progress.steps += 1
        self.progress.undecided += decision is None
        for action in decision.actions if decision is not None else ():
            LOG.info("%s", action)
            done = self.progress.actions
            done[action.act] = done.get(action.act, 0) + 1
        return decision

    async def _rest(self, stop: asyncio.Event, rest_s: float) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, self.woken)]
        slept = asyncio.ensure_future(self._slept(rest_s))
        try:
            await asyncio.wait([*waits, slept], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (*waits, slept):
                one.cancel()

    async def _slept(self, rest_s: float) -> None:
        await self.clock.sleep(rest_s)
