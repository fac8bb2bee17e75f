"""Providers that are broken in one way each, over any that works: the suite has to notice all."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.provider import LaunchRefused, Machine, Provider
from autoscale.spot.events import SpotEvent
from tests.autoscale.providers import suite
from tests.autoscale.providers.suite import Check


class Whole:
    """Passes everything on."""

    def __init__(self, inner: Provider) -> None:
        self.inner = inner

    async def offers(self) -> Sequence[Offer]:
        return await self.inner.offers()

    async def launch(self, offer: Offer, token: str) -> Machine:
        return await self.inner.launch(offer, token)

    async def terminate(self, machine_id: str) -> None:
        await self.inner.terminate(machine_id)

    async def machines(self) -> Sequence[Machine]:
        return await self.inner.machines()

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        return await self.inner.events(cursor)


class IgnoresTokens(Whole):
    _numbers = itertools.count()

    async def launch(self, offer: Offer, token: str) -> Machine:
        made = await self.inner.launch(offer, f"{token}/{next(self._numbers)}")
        return replace(made, token=token)


class TokenForAnyOffer(Whole):
    async def launch(self, offer: Offer, token: str) -> Machine:
        made = {m.token: m for m in await self.inner.machines()}
        return made[token] if token in made else await self.inner.launch(offer, token)


class ForgetsTokensOfTheDead(Whole):
    async def launch(self, offer: Offer, token: str) -> Machine:
        made = await self.inner.launch(offer, token)
        if made.state == "gone":
            return await self.inner.launch(offer, token + "'")
        return made


class KnowsItsMachines(Whole):
    """terminate raises for an id that is not held."""

    async def terminate(self, machine_id: str) -> None:
        listed = {m.id for m in await self.inner.machines() if m.state != "gone"}
        if machine_id not in listed:
            raise KeyError(machine_id)
        await self.inner.terminate(machine_id)


class LeavesPending(Whole):
    """terminate does nothing to a machine that is starting."""

    async def terminate(self, machine_id: str) -> None:
        pending = {m.id for m in await self.inner.machines() if m.state == "pending"}
        if machine_id not in pending:
            await self.inner.terminate(machine_id)


class RefusesTooLate(Whole):
    """A refusal that has made a machine nevertheless."""

    async def launch(self, offer: Offer, token: str) -> Machine:
        try:
            return await self.inner.launch(offer, token)
        except LaunchRefused as refusal:
            if refusal.kind == "capacity":
                listed = {o.name: o for o in await self.inner.offers()}
                await self.inner.launch(next(o for n, o in listed.items() if n != offer.name), "x")
            raise


class HidesNotices(Whole):
    async def machines(self) -> Sequence[Machine]:
        shown = await self.inner.machines()
        return [
            replace(m, doomed_s=None, state="running" if m.state == "draining" else m.state)
            for m in shown
        ]


class HidesPending(Whole):
    """The listing has only what is usable: what was asked for before a crash is lost."""

    async def machines(self) -> Sequence[Machine]:
        return [m for m in await self.inner.machines() if m.state != "pending"]


class TellsAllAgain(Whole):
    """Events ignore the cursor."""

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        return await self.inner.events(0)


class TellsOnce(Whole):
    """Events are forgotten as soon as they were told, whether or not the answer arrived."""

    def __init__(self, inner: Provider) -> None:
        super().__init__(inner)
        self.cursor = 0

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        told, self.cursor = await self.inner.events(max(cursor, self.cursor))
        return told, self.cursor


class ReadyAtOnce(Whole):
    async def machines(self) -> Sequence[Machine]:
        return [
            replace(m, state="running", ready_s=m.launched_s) if m.state == "pending" else m
            for m in await self.inner.machines()
        ]


class TakesAtTheNotice(Whole):
    """A machine is gone as soon as it is told."""

    async def machines(self) -> Sequence[Machine]:
        for machine in await self.inner.machines():
            if machine.doomed_s is not None:
                await self.inner.terminate(machine.id)
        return await self.inner.machines()


# What is broken -> the check that has to fail.
BROKEN: Mapping[Callable[[Provider], Provider], Check] = {
    IgnoresTokens: suite.same_token_is_same_machine,
    TokenForAnyOffer: suite.token_of_another_offer_is_refused,
    ForgetsTokensOfTheDead: suite.token_outlives_its_machine,
    KnowsItsMachines: suite.lost_answers_cost_nothing,
    LeavesPending: suite.terminates_whatever_the_state,
    RefusesTooLate: suite.refusal_for_capacity,
    HidesNotices: suite.notice_then_loss,
    HidesPending: suite.nothing_is_forgotten_in_a_crash,
    TellsAllAgain: suite.events_are_told_once,
    TellsOnce: suite.events_are_told_once,
    ReadyAtOnce: suite.starts_and_is_listed,
    TakesAtTheNotice: suite.notice_then_loss,
}


async def must_be_noticed(broken: Callable[[Provider], Provider], site: suite.Site) -> None:
    """Fails unless the suite notices a provider that is broken over a site that works."""
    site.wrap = broken
    site.provider = broken(site.provider)
    with pytest.raises((AssertionError, KeyError, LaunchRefused, pytest.fail.Exception)):
        await BROKEN[broken](site)
