"""The control loop in virtual time: the driver, loop and policies of production over a market and a
stream of requests.

In each period the market takes what it takes, the driver makes one step, and requests are served
until the next. Nothing that is kept grows with the length of the trace: the course is thinned.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from autoscale.loop.actions import Decision, Warn
from autoscale.loop.drive import Driver, Log
from autoscale.loop.step import Loop
from autoscale.simulate.market import Market
from autoscale.simulate.rented import MarketProvider, SteppedClock
from autoscale.simulate.requests import ReplicaSpeed, Request, RequestLoad
from autoscale.simulate.served import SimulatedService

POINTS = 1024  # of a course, at most twice as many


class Point(NamedTuple):
    """A moment of the course: replicas needed, answering, machines held (spot and all), dollars per
    hour, 90th percentile of the first token (None of no request)."""

    at_s: float
    need: int
    answering: int
    spot: int
    machines: int
    usd_per_h: float
    first_p90_s: float | None


@dataclass
class LoopReport:
    """What the loop came to. needed, missing: replicas, summed over steps; all_on_demand_usd: what
    the need alone costs on demand."""

    load: RequestLoad
    steps: int = 0
    enough: int = 0  # steps in which as many answered as were needed
    needed: int = 0
    missing: int = 0
    spot_usd: float = 0.0
    on_demand_usd: float = 0.0
    all_on_demand_usd: float = 0.0
    launched: int = 0
    refused: int = 0
    preempted: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    warnings: list[Warn] = field(default_factory=list)  # the first hundred
    course: list[Point] = field(default_factory=list)

    @property
    def availability(self) -> float:
        return self.enough / self.steps

    @property
    def usd(self) -> float:
        return self.spot_usd + self.on_demand_usd


class World:
    """One simulation. `run` carries it to its end."""

    def __init__(
        self,
        market: Market,
        loop: Loop,
        arrivals: Iterator[Request],
        speed: ReplicaSpeed,
        *,
        notice_s: float = 120.0,
        log: Log | None = None,
    ) -> None:
        self.market, self.loop = market, loop
        self.clock = SteppedClock()
        self.provider = MarketProvider(market, self.clock, notice_s=notice_s)
        self.service = SimulatedService(
            self.provider, RequestLoad(arrivals, speed, most=1), self.clock
        )
        self.driver = Driver(self.provider, self.service, loop, self.clock, log)
        self.report = LoopReport(self.service.load)
        self._every = 1

    def run(self) -> LoopReport:
        """Until the market's trace ends."""
        return asyncio.run(self._run())

    async def _run(self) -> LoopReport:
        period_s = self.loop.settings.period_s
        for step in range(1, int(self.market.steps * self.market.period_s / period_s)):
            now_s = step * period_s
            self.clock.time_s = now_s
            self.service.gone(self.provider.pass_time())
            answering = self.service.answering()
            decision = await self.driver.once()
            assert decision is not None, "the simulated provider always lists its machines"
            self._account(decision, answering)
            self.service.advance(now_s, now_s + period_s)
        return self._ended()

    def _account(self, decision: Decision, answering: int) -> None:
        report, need = self.report, sum(role.need for role in decision.needs.values())
        hours = self.loop.settings.period_s / 3600
        floor = min(o.usd_per_h for o in self.market.offers if o.market == "on_demand")
        report.steps += 1
        report.enough += answering >= need
        report.needed += need
        report.missing += max(0, need - answering)
        report.all_on_demand_usd += need * floor * hours
        report.actions.update(action.act for action in decision.actions)
        warned = [action for action in decision.actions if isinstance(action, Warn)]
        report.warnings += warned[: max(0, 100 - len(report.warnings))]
        if report.steps % self._every == 0:
            self._note(need, answering)

    def _note(self, need: int, answering: int) -> None:
        """One more point of the course; every other one goes when there are too many."""
        offers = {offer.name: offer for offer in self.market.offers}
        held = [offers[machine.offer] for machine in self.provider.rented.values()]
        spot = sum(offer.market == "spot" for offer in held)
        usd_per_h = sum(offer.usd_per_h for offer in held)
        recent = self.driver.load("decode")
        self.report.course.append(
            Point(
                self.clock.now_s(),
                need,
                answering,
                spot,
                len(held),
                usd_per_h,
                recent.ttft_p90_s if recent else None,
            )
        )
        if len(self.report.course) > 2 * POINTS:
            self.report.course = self.report.course[1::2]
            self._every *= 2

    def _ended(self) -> LoopReport:
        report, provider = self.report, self.provider
        report.spot_usd, report.on_demand_usd = provider.bill.spot_usd, provider.bill.on_demand_usd
        report.launched, report.refused = provider.launched, provider.refused
        report.preempted = provider.preempted
        return report
