"""The provider whose machines are the worker pods of a RayService; see Provider for the contract.

A worker group is an offer (its labels say kind, market and price; maxReplicas is its quota), a
launch one replica more, and giving back an eviction of exactly that pod, which disruption budgets
may delay. KubeRay and the node autoscaler do the rest.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from autoscale.catalog.offer import Offer
from autoscale.providers.kubernetes.api import Api, Conflict, connect
from autoscale.providers.kubernetes.ledger import Entry, Ledger, id_of
from autoscale.providers.kubernetes.look import Change, Look, Lookout
from autoscale.providers.provider import LaunchRefused, Machine, MachineState
from autoscale.spot.events import SpotEvent
from cluster.clock import Clock
from cluster.settings import Settings
from cluster.settings.kubernetes import KubernetesSettings

RETRY_S = 30.0  # how soon a refused launch may be asked again
T = TypeVar("T")


class KubernetesProvider:
    """wall_s: seconds since 1970; its distance from the clock is taken once, so that a time is
    told the same each time. Several of one service do no harm to each other."""

    def __init__(
        self,
        api: Api,
        settings: KubernetesSettings,
        clock: Clock,
        wall_s: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.api, self.settings, self.clock = api, settings, clock
        self._offset_s = wall_s() - clock.now_s()
        self._lookout = Lookout(api, settings, wall_s, pause)
        self._one = asyncio.Lock()
        self.pods: dict[str, str] = {}  # machine -> its pod, at the last look
        self._looking: asyncio.Task[Look] | None = None

    async def offers(self) -> Sequence[Offer]:
        return tuple(group.offer for group in (await self._look()).seen.groups)

    async def launch(self, offer: Offer, token: str) -> Machine:
        """LaunchRefused `capacity` where the node autoscaler says at once that it gets no machine;
        where it says so later, the machine is gone from the listing then."""
        found = await self._changed(lambda look: _launched(look, offer, token))
        if not any(entry.token == token and entry.pod for entry in found.ledger.entries):
            found = await self._changed(lambda look: look.ledger)  # KubeRay may have been as quick
        entry = found.ledger.find(id_of(token))
        if entry is None:
            raise LaunchRefused("capacity", RETRY_S, f"{offer.name}: no machine to be had now")
        return self._machine(entry)

    async def terminate(self, machine_id: str) -> None:
        """ApiFailed 429 where a disruption budget keeps the pod for now."""
        found = await self._changed(lambda look: _leaving(look, machine_id))
        entry = found.ledger.find(machine_id)
        if entry is None or entry.gone_s is not None:
            return
        if entry.pod:
            await asyncio.to_thread(self._lookout.evict, entry.pod)
        await self._changed(lambda look: _gone(look, machine_id))

    async def machines(self) -> Sequence[Machine]:
        return tuple(map(self._machine, (await self._look()).ledger.entries))

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        """Since the beginning, as far as they are kept (the last 400)."""
        ledger = (await self._look()).ledger
        told = [replace(e, t_s=e.t_s - self._offset_s) for e in ledger.events]
        fresh = told[max(0, cursor - ledger.dropped) :]
        return tuple(fresh), ledger.dropped + len(told)

    async def _look(self) -> Look:
        """A look that began after it was asked for, or one that others wait for at this moment."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._changed(None))
            await asyncio.sleep(0)
        return await asyncio.shield(self._looking)

    async def _changed(self, change: Change | None) -> Look:
        async with self._one:
            found = await asyncio.to_thread(self._lookout.look, change)
        self.pods = {e.id: e.pod for e in found.ledger.entries if e.gone_s is None and e.pod}
        return found

    def _machine(self, entry: Entry) -> Machine:
        state: MachineState = "pending"
        if entry.gone_s is not None:
            state = "gone"
        elif entry.ready_s is not None:
            state = "running" if entry.doomed_s is None else "draining"
        return Machine(
            entry.id,
            entry.group,
            state,
            entry.asked_s - self._offset_s,
            None if entry.ready_s is None else entry.ready_s - self._offset_s,
            None if entry.doomed_s is None else entry.doomed_s - self._offset_s,
            entry.token,
        )


def _launched(look: Look, offer: Offer, token: str) -> Ledger:
    known = look.ledger.find(id_of(token))
    if known is not None:
        if known.group != offer.name:
            raise ValueError(f"{token!r} stands for a machine of {known.group!r} already")
        return look.ledger
    group = look.group(offer.name)
    if group is None:
        names = ", ".join(each.name for each in look.seen.groups) or "none"
        raise LaunchRefused(
            "invalid", math.inf, f"no worker group {offer.name!r}; there are {names}"
        )
    held = len(look.ledger.held(offer.name))
    if group.offer.quota is not None and held >= group.offer.quota:
        said = f"{offer.name}: {held} are all that maxReplicas allows"
        raise LaunchRefused("quota", RETRY_S, said)
    return look.ledger.put(Entry(token, offer.name, look.seen.now_s))


def _leaving(look: Look, machine_id: str) -> Ledger:
    """From here on its end is no loss."""
    entry = look.ledger.find(machine_id)
    if entry is None or entry.gone_s is not None:
        return look.ledger
    return look.ledger.put(replace(entry, leaving=True))


def _gone(look: Look, machine_id: str) -> Ledger:
    entry = look.ledger.find(machine_id)
    if entry is None or entry.gone_s is not None:
        return look.ledger
    return look.ledger.put(replace(entry, gone_s=look.seen.now_s))


def from_settings(settings: Settings, clock: Clock) -> KubernetesProvider:
    """ValueError, in words, where there is no way to the API server."""
    chosen = settings.autoscale.kubernetes
    return KubernetesProvider(connect(chosen), chosen, clock)


__all__ = ["Conflict", "KubernetesProvider", "from_settings"]
