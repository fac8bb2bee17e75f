"""The provider whose machines are processes of this one; see Provider for the contract.

Its market runs on the caller's clock: whenever it is asked something, and while `watch` runs, it
first does all that is due by then. What is taken is told `notice_s` before and then ended by
SIGKILL. Spot machines are taken in an order drawn from a seed; those on demand never.
"""

import math
import random
from collections.abc import Sequence

from autoscale.catalog.offer import Offer
from autoscale.providers.local.bodies import Bodies
from autoscale.providers.local.ledger import Ledger, id_of
from autoscale.providers.local.market import LocalMarket
from autoscale.providers.provider import LaunchRefused, Machine
from autoscale.spot.events import EventKind, SpotEvent
from cluster.clock import Clock

WATCH_S = 0.1  # how long what is due may wait
RETRY_S = 5.0  # how soon a refused launch may be asked again, if nothing else is said


class LocalProvider:
    """One caller at a time; a second one with the same ledger goes on where the first ended."""

    def __init__(
        self,
        ledger: Ledger,
        market: LocalMarket,
        bodies: Bodies,
        clock: Clock,
        *,
        seed: int = 0,
        retry_s: float = RETRY_S,
    ) -> None:
        self.ledger = ledger
        self.market = market
        self.bodies = bodies
        self.clock = clock
        self.seed = seed
        self.retry_s = retry_s
        self.opened_s = ledger.opened_s(clock.now_s())
        self._reached_s = clock.now_s()
        self._find_started()

    async def offers(self) -> Sequence[Offer]:
        return self.market.offers

    async def launch(self, offer: Offer, token: str) -> Machine:
        self.advance()
        known = self.ledger.machines.get(id_of(token))
        if known is not None:
            if known.offer != offer.name:
                raise ValueError(f"{token!r} stands for a machine of {known.offer!r} already")
            return known
        self._refuse(offer)
        machine = Machine(
            id_of(token), offer.name, "pending", self.clock.now_s(), None, None, token
        )
        self.ledger.keep(machine)
        try:
            self.bodies.start(machine.id, offer)
        except OSError:
            self.ledger.forget(machine.id)
            raise
        self.ledger.started(machine.id)
        self._tell("launch_ok", offer.name, len(self._held(offer.name)))
        self.advance()
        return self.ledger.machines[machine.id]

    async def terminate(self, machine_id: str) -> None:
        self.advance()
        if machine_id not in self.ledger.machines:
            return
        self.bodies.kill(machine_id)
        self.ledger.change(machine_id, state="gone")

    async def machines(self) -> Sequence[Machine]:
        self.advance()
        return tuple(self.ledger.machines.values())

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        self.advance()
        return tuple(self.ledger.events[cursor:]), len(self.ledger.events)

    async def watch(self) -> None:
        """Do what is due when it is due, for ever; run it beside whatever uses the machines."""
        while True:
            self.advance()
            await self.clock.sleep(WATCH_S)

    def close(self) -> None:
        """End every machine, at the end of a drill or of a test."""
        for machine_id in self.bodies.alive():
            self.bodies.kill(machine_id)

    def advance(self) -> None:
        """All that is due by now, in the order of its times."""
        now_s = self.clock.now_s()
        opened_s = self.opened_s
        for at_s in self.market.instants(self._reached_s - opened_s, now_s - opened_s):
            self._reach(opened_s + at_s)
        self._reached_s = now_s
        alive = self.bodies.alive()
        for machine in self._held():
            if machine.id not in alive:  # it died of its own, or by somebody's hand
                self.bodies.kill(machine.id)  # what its first process left behind
                self._lose(machine, now_s)
        self._reach(now_s)
        for machine in self._held():
            if machine.state == "pending" and self._ready(machine, now_s):
                state = "running" if machine.doomed_s is None else "draining"
                self.ledger.change(machine.id, state=state, ready_s=now_s)

    def _reach(self, at_s: float) -> None:
        """Notices that are given, then losses that come true, at one moment."""
        for offer in self.market.offers:
            for step in self.market.ahead(offer.name, at_s - self.opened_s):
                self._doom(offer.name, step.machines, at_s, self.opened_s + step.t_s)
            there = self.market.capacity(offer.name, at_s - self.opened_s)
            if there is not None:
                self._doom(offer.name, there, at_s, at_s)
        for machine in self._held():
            if machine.doomed_s is not None and machine.doomed_s <= at_s:
                self.bodies.kill(machine.id)
                self._lose(machine, at_s)

    def _doom(self, pool: str, left: int, now_s: float, at_s: float) -> None:
        """Give notice to as many machines as there will be too many at at_s."""
        staying = [m for m in self._held(pool) if m.doomed_s is None or m.doomed_s > at_s]
        if len(staying) <= left:
            return
        draw = random.Random(f"{self.seed}/{pool}/{at_s - self.opened_s:.3f}")
        for machine in draw.sample(staying, len(staying) - left):
            state = "draining" if machine.state == "running" else machine.state
            self.ledger.change(machine.id, state=state, doomed_s=at_s)
            self._tell("notice", pool, at_s - now_s, now_s)

    def _lose(self, machine: Machine, at_s: float) -> None:
        self.ledger.change(machine.id, state="gone")
        self._tell("preempt", machine.offer, len(self._held(machine.offer)), at_s)

    def _ready(self, machine: Machine, now_s: float) -> bool:
        offer = self.market.offer(machine.offer)
        startup_s = offer.startup_s if offer else 0.0
        return now_s - machine.launched_s >= startup_s and self.bodies.up(machine.id)

    def _refuse(self, offer: Offer) -> None:
        """LaunchRefused where one more machine of the offer can't be had."""
        known = self.market.offer(offer.name)
        if known is None:
            names = ", ".join(each.name for each in self.market.offers)
            raise LaunchRefused("invalid", math.inf, f"no offer {offer.name!r}; there are {names}")
        held, name = len(self._held(offer.name)), offer.name
        if known.quota is not None and held >= known.quota:
            raise LaunchRefused("quota", self.retry_s, f"{name}: {held} is all the quota allows")
        there = self.market.capacity(name, self.clock.now_s() - self.opened_s)
        if there is not None and held >= there:
            self._tell("launch_fail", name, held)
            raise LaunchRefused("capacity", self.retry_s, f"{name}: no more than {held} there now")

    def _held(self, pool: str | None = None) -> list[Machine]:
        """What is paid for, of one offer or of all."""
        every = self.ledger.machines.values()
        return [m for m in every if m.state != "gone" and pool in (None, m.offer)]

    def _tell(self, kind: EventKind, pool: str, value: float, at_s: float | None = None) -> None:
        at_s = self.clock.now_s() if at_s is None else at_s
        self.ledger.tell(SpotEvent(at_s, pool, kind, float(value)))

    def _find_started(self) -> None:
        """After a crash between noting a launch and starting it, there is nothing to pay for."""
        alive = self.bodies.alive()
        for machine in self._held():
            if machine.id not in alive and self.ledger.never_started(machine.id):
                self.ledger.forget(machine.id)
