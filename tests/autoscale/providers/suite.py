"""What every provider has to do, whoever it rents from: checks over a `Site`. broken.py has
providers that are broken in one way each, which the checks have to notice.

A site is a provider, the hands of its cloud, and the cloud's own word on what exists, read by other
code than the provider's.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

import pytest

from autoscale.catalog.offer import Offer
from autoscale.providers.provider import LaunchRefused, Machine, Provider
from autoscale.spot.events import SpotEvent

STARTUP_S = 60.0  # of the site's spot offer
NOTICE_S = 30.0


class Site(Protocol):
    """provider: under test, of a cloud in which nothing was rented yet. spot: an offer whose
    machines take STARTUP_S to start and are told NOTICE_S before they are taken; its quota is 4.
    other: another offer, on demand. wrap: what `again` puts around a provider."""

    provider: Provider
    wrap: Callable[[Provider], Provider]
    spot: Offer
    other: Offer

    def again(self) -> Provider:
        """A provider of the same cloud as a caller makes it after its crash."""
        ...

    async def passes(self, duration_s: float) -> None:
        """Time passes for all."""
        ...

    def limit(self, machines: int, in_s: float = 0.0) -> None:
        """From in_s on there are so many spot machines, which the market tells as it does."""
        ...

    def alive(self) -> set[str]:
        """Ids of the machines that exist in the cloud: the oracle."""
        ...

    def now_s(self) -> float:
        """The clock that machines and events are stamped with."""
        ...


class LosesAnswers:
    """A provider whose calls take effect, but whose first answer to each call is lost."""

    def __init__(self, inner: Provider) -> None:
        self.inner = inner
        self.lost: set[str] = set()

    async def launch(self, offer: Offer, token: str) -> Machine:
        machine = await self.inner.launch(offer, token)
        self._lose(f"launch {token}")
        return machine

    async def terminate(self, machine_id: str) -> None:
        await self.inner.terminate(machine_id)
        self._lose(f"terminate {machine_id}")

    def _lose(self, call: str) -> None:
        if call not in self.lost:
            self.lost.add(call)
            raise TimeoutError(f"the answer to {call} was lost")


async def state(provider: Provider, machine_id: str) -> Machine | None:
    """A machine as it is listed; None when it is not listed any more."""
    return next((m for m in await provider.machines() if m.id == machine_id), None)


async def held(provider: Provider) -> set[str]:
    """What the provider says is paid for."""
    return {m.id for m in await provider.machines() if m.state != "gone"}


async def kinds(provider: Provider, kind: str) -> list[SpotEvent]:
    """All events of one kind."""
    return [event for event in (await provider.events(0))[0] if event.kind == kind]


async def one_doomed(provider: Provider) -> Machine:
    """The one machine of which a loss is known."""
    doomed = [m for m in await provider.machines() if m.doomed_s is not None]
    assert len(doomed) == 1
    return doomed[0]


async def starts_and_is_listed(site: Site) -> None:
    asked_s = site.now_s()
    made = await site.provider.launch(site.spot, "a")
    assert (made.offer, made.token, made.state, made.doomed_s) == (
        site.spot.name,
        "a",
        "pending",
        None,
    )
    assert site.alive() == {made.id}
    await site.passes(STARTUP_S * 0.9)
    early = await state(site.provider, made.id)
    assert early is not None and early.state == "pending" and early.ready_s is None
    await site.passes(STARTUP_S * 0.2)
    ready = await state(site.provider, made.id)
    assert ready is not None and ready.state == "running" and ready.ready_s is not None
    assert asked_s + STARTUP_S * 0.9 < ready.ready_s <= site.now_s()
    assert [e.pool for e in await kinds(site.provider, "launch_ok")] == [site.spot.name]


async def same_token_is_same_machine(site: Site) -> None:
    first = await site.provider.launch(site.spot, "a")
    second = await site.provider.launch(site.spot, "a")
    assert second.id == first.id
    at_once = await asyncio.gather(*(site.provider.launch(site.spot, "b") for _ in range(3)))
    assert len({machine.id for machine in at_once}) == 1
    assert site.alive() == {first.id, at_once[0].id} == await held(site.provider)
    assert len(site.alive()) == 2


async def token_of_another_offer_is_refused(site: Site) -> None:
    made = await site.provider.launch(site.spot, "a")
    with pytest.raises(ValueError):
        await site.provider.launch(site.other, "a")
    assert site.alive() == {made.id}


async def token_outlives_its_machine(site: Site) -> None:
    """A launch whose answer comes late makes no second machine of what was given back already."""
    made = await site.provider.launch(site.spot, "a")
    await site.provider.terminate(made.id)
    late = await site.provider.launch(site.spot, "a")
    assert (late.id, late.state) == (made.id, "gone")
    assert site.alive() == set()


async def lost_answers_cost_nothing(site: Site) -> None:
    losing = LosesAnswers(site.provider)
    with pytest.raises(TimeoutError):
        await losing.launch(site.spot, "a")
    made = await losing.launch(site.spot, "a")
    assert site.alive() == {made.id} == await held(site.provider)
    with pytest.raises(TimeoutError):
        await losing.terminate(made.id)
    await losing.terminate(made.id)
    assert site.alive() == set() == await held(site.provider)


async def terminates_whatever_the_state(site: Site) -> None:
    pending = await site.provider.launch(site.spot, "a")
    running = await site.provider.launch(site.other, "b")
    await site.provider.terminate(pending.id)
    await site.passes(STARTUP_S * 1.1)
    assert site.alive() == {running.id} == await held(site.provider)
    for _ in range(2):
        await site.provider.terminate(running.id)
        await site.provider.terminate(pending.id)
        await site.provider.terminate("nobody")
    assert site.alive() == set() == await held(site.provider)
    assert await kinds(site.provider, "preempt") == []


async def refusal_for_capacity(site: Site) -> None:
    site.limit(1)
    made = await site.provider.launch(site.spot, "a")
    with pytest.raises(LaunchRefused) as refused:
        await site.provider.launch(site.spot, "b")
    assert refused.value.kind == "capacity" and 0 <= refused.value.retry_s < math.inf
    assert site.alive() == {made.id} == await held(site.provider)
    assert [e.value for e in await kinds(site.provider, "launch_fail")] == [1.0]
    assert (await site.provider.launch(site.spot, "a")).id == made.id
    site.limit(2)
    other = await site.provider.launch(site.spot, "b")
    assert site.alive() == {made.id, other.id}


async def refusal_for_quota_and_nonsense(site: Site) -> None:
    assert site.spot.quota == 4
    for number in range(4):
        await site.provider.launch(site.spot, f"{number}")
    with pytest.raises(LaunchRefused) as refused:
        await site.provider.launch(site.spot, "one more")
    assert refused.value.kind == "quota"
    with pytest.raises(LaunchRefused) as refused:
        await site.provider.launch(replace(site.spot, name="no such offer"), "c")
    assert refused.value.kind == "invalid"
    assert len(site.alive()) == 4


async def notice_then_loss(site: Site) -> None:
    made = {(await site.provider.launch(site.spot, t)).id for t in "abc"}
    await site.passes(STARTUP_S * 1.1)
    site.limit(2, in_s=NOTICE_S * 2)
    told_s = site.now_s() + NOTICE_S
    await site.passes(NOTICE_S * 0.9)
    assert all(m.doomed_s is None for m in await site.provider.machines())
    await site.passes(NOTICE_S * 0.2)
    doomed = await one_doomed(site.provider)
    assert doomed.state == "draining" and doomed.doomed_s == pytest.approx(told_s + NOTICE_S, abs=1)
    [notice] = await kinds(site.provider, "notice")
    assert notice.t_s + notice.value == pytest.approx(doomed.doomed_s, abs=1)
    await site.passes(NOTICE_S * 0.8)
    assert site.alive() == made, "nothing may be taken before its time"
    await site.passes(NOTICE_S * 0.2)
    gone = await state(site.provider, doomed.id)
    assert gone is None or gone.state == "gone"
    assert site.alive() == made - {doomed.id} == await held(site.provider)
    assert [e.value for e in await kinds(site.provider, "preempt")] == [2.0]


async def notice_while_launching(site: Site) -> None:
    """One is told while it starts and never gets ready; one gets ready with its notice told."""
    first = await site.provider.launch(site.spot, "a")
    site.limit(0, in_s=STARTUP_S * 0.5)
    await site.passes(STARTUP_S * 0.3)
    told = await state(site.provider, first.id)
    assert told is not None and told.state == "pending" and told.doomed_s is not None
    await site.passes(STARTUP_S * 0.3)
    assert site.alive() == set() == await held(site.provider)
    site.limit(1)
    second = await site.provider.launch(site.spot, "b")
    site.limit(0, in_s=STARTUP_S + NOTICE_S * 0.5)
    await site.passes(STARTUP_S + NOTICE_S * 0.1)
    there = await state(site.provider, second.id)
    assert there is not None and there.state == "draining" and there.doomed_s is not None
    assert len(await kinds(site.provider, "notice")) == 2


async def given_back_under_notice(site: Site) -> None:
    """A machine that its renter gives back in time is no loss, and no other goes for it."""
    made = [await site.provider.launch(site.spot, t) for t in "ab"]
    await site.passes(STARTUP_S * 1.1)
    site.limit(1, in_s=NOTICE_S)
    await site.passes(NOTICE_S * 0.3)
    doomed = await one_doomed(site.provider)
    await site.provider.terminate(doomed.id)
    await site.passes(NOTICE_S * 1.1)
    assert site.alive() == {m.id for m in made} - {doomed.id}
    assert await kinds(site.provider, "preempt") == []


async def events_are_told_once(site: Site) -> None:
    told: list[SpotEvent] = []
    cursor = 0

    async def more() -> None:
        nonlocal cursor
        fresh, cursor = await site.provider.events(cursor)
        told.extend(fresh)

    await more()
    for token in "ab":
        await site.provider.launch(site.spot, token)
        await more()
    site.limit(1, in_s=NOTICE_S)
    await site.passes(NOTICE_S * 0.5)
    again, _ = await site.provider.events(cursor)
    await more()
    assert told[-len(again) :] == list(again) and again, "the same cursor tells the same"
    await site.passes(NOTICE_S)
    await more()
    await more()
    whole, _ = await site.provider.events(0)
    assert told == list(whole)
    marks = [e.kind for e in told if e.kind in ("launch_ok", "notice", "preempt")]
    assert marks == ["launch_ok", "launch_ok", "notice", "preempt"]
    assert [e.t_s for e in told] == sorted(e.t_s for e in told)


async def nothing_is_forgotten_in_a_crash(site: Site) -> None:
    """The caller dies right after a launch whose answer it never saw."""
    pending = await site.provider.launch(site.spot, "a")
    await site.passes(STARTUP_S * 1.1)
    with pytest.raises(TimeoutError):
        await LosesAnswers(site.provider).launch(site.spot, "b")
    before, cursor = await site.provider.events(0)
    site.provider = site.again()
    assert await held(site.provider) == site.alive() and len(site.alive()) == 2
    assert (await site.provider.launch(site.spot, "a")).id == pending.id
    orphan = await site.provider.launch(site.spot, "b")
    assert len(site.alive()) == 2
    assert list(before) == list((await site.provider.events(0))[0])[:cursor]
    site.limit(1, in_s=NOTICE_S)
    await site.passes(NOTICE_S * 0.5)
    site.provider = site.again()
    doomed = [m.id for m in await site.provider.machines() if m.doomed_s is not None]
    assert len(doomed) == 1 and {*doomed} < {pending.id, orphan.id}
    await site.passes(NOTICE_S)
    site.provider = site.again()
    assert site.alive() == {pending.id, orphan.id} - {*doomed} == await held(site.provider)
    for machine_id in site.alive():
        await site.provider.terminate(machine_id)
    assert site.alive() == set()


Check = Callable[[Site], Awaitable[None]]


async def holds(check: Check, site: Site) -> None:
    """One check of the contract over a site."""
    await check(site)


CHECKS: Sequence[Check] = (
    starts_and_is_listed,
    same_token_is_same_machine,
    token_of_another_offer_is_refused,
    token_outlives_its_machine,
    lost_answers_cost_nothing,
    terminates_whatever_the_state,
    refusal_for_capacity,
    refusal_for_quota_and_nonsense,
    notice_then_loss,
    notice_while_launching,
    given_back_under_notice,
    events_are_told_once,
    nothing_is_forgotten_in_a_crash,
)
