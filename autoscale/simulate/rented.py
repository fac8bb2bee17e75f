"""A market as a provider: the contract of autoscale/providers over a recorded or made trace, in
virtual time. What the market takes is told ahead by a notice, if it gives one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoscale.catalog.offer import Offer
from autoscale.providers.provider import LaunchRefused, Machine
from autoscale.simulate.market import Market
from autoscale.spot.events import SpotEvent


class SteppedClock:
    """Time that whoever simulates sets. Sleeping takes it on at once: nobody else is waiting."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.time_s = start_s

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, duration_s: float) -> None:
        self.time_s += max(0.0, duration_s)
        await asyncio.sleep(0)


@dataclass
class Bill:
    """Dollars so far, by market."""

    spot_usd: float = 0.0
    on_demand_usd: float = 0.0


class MarketProvider:
    """Rents machines out of a market. Implements `Provider`. The market is looked at whenever the
    clock has gone on (`pass_time`); its trace ends with its last step, which stays."""

    def __init__(self, market: Market, clock: SteppedClock, *, notice_s: float = 0.0) -> None:
        self.market, self.clock, self.notice_s = market, clock, notice_s
        self.bill = Bill()
        self.launched = self.refused = self.preempted = 0
        self.rented: dict[str, Machine] = {}
        self._by_token: dict[str, str] = {}
        self._events: list[SpotEvent] = []
        self._dropped = 0  # events that everybody has read
        self._column = {offer.name: place for place, offer in enumerate(market.spot)}
        self._offer = {offer.name: offer for offer in market.offers}
        self._billed_s = clock.now_s()

    async def offers(self) -> Sequence[Offer]:
        return self.market.offers

    async def launch(self, offer: Offer, token: str) -> Machine:
        known = self._by_token.get(token)
        if known is not None and known in self.rented:
            return self.rented[known]
        self._refuse(offer)
        self.launched += 1
        now_s = self.clock.now_s()
        machine = Machine(f"m{self.launched}", offer.name, "running", now_s, now_s, None, token)
        self.rented[machine.id] = machine
        self._by_token[token] = machine.id
        return machine

    async def terminate(self, machine_id: str) -> None:
        gone = self.rented.pop(machine_id, None)
        if gone is not None:
            del self._by_token[gone.token]

    async def machines(self) -> Sequence[Machine]:
        return list(self.rented.values())

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        """Events before the cursor are forgotten: there is one reader, so that memory stays flat in
        the length of the trace."""
        read = self._events[cursor - self._dropped :]
        self._events, self._dropped = read, cursor
        return tuple(read), cursor + len(read)

    def pass_time(self) -> list[str]:
        """Bill what was held until now, take back what is due; the ids of what is gone."""
        now_s = self.clock.now_s()
        self._pay(now_s)
        capacity = self.market.capacity[
            min(int(now_s / self.market.period_s), self.market.steps - 1)
        ]
        for pool, column in self._column.items():
            mine = [m for m in self.rented.values() if m.offer == pool and m.doomed_s is None]
            over = len(mine) - int(capacity[column])
            self.preempted += max(0, over)
            for machine in mine[len(mine) - max(0, over) :]:
                self.rented[machine.id] = replace(
                    machine, state="draining", doomed_s=now_s + self.notice_s
                )
                if self.notice_s:
                    self._events.append(SpotEvent(now_s, pool, "notice", self.notice_s))
        return self._take_back(now_s)

    def _take_back(self, now_s: float) -> list[str]:
        due = [m for m in self.rented.values() if m.doomed_s is not None and m.doomed_s <= now_s]
        for machine in due:
            del self.rented[machine.id]
            del self._by_token[machine.token]
        for pool in dict.fromkeys(machine.offer for machine in due):
            left = sum(machine.offer == pool for machine in self.rented.values())
            self._events.append(SpotEvent(now_s, pool, "preempt", left))
        return [machine.id for machine in due]

    def _pay(self, now_s: float) -> None:
        hours = (now_s - self._billed_s) / 3600
        self._billed_s = now_s
        for machine in self.rented.values():
            offer = self._offer[machine.offer]
            if offer.market == "spot":
                self.bill.spot_usd += offer.usd_per_h * hours
            else:
                self.bill.on_demand_usd += offer.usd_per_h * hours

    def _refuse(self, offer: Offer) -> None:
        """LaunchRefused where the market has no more, or the quota is used up."""
        held = sum(machine.offer == offer.name for machine in self.rented.values())
        if offer.quota is not None and held >= offer.quota:
            self.refused += 1
            raise LaunchRefused("quota", 0.0, f"{offer.name}: the quota is {offer.quota}")
        column = self._column.get(offer.name)
        if column is None:
            return
        step = min(int(self.clock.now_s() / self.market.period_s), self.market.steps - 1)
        if held >= self.market.capacity[step, column]:
            self.refused += 1
            raise LaunchRefused("capacity", 0.0, f"{offer.name}: no machine is to be had")
