"""The actuator over a served model and training jobs, in virtual time: who may be on a machine."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from autoscale.loop.actions import Return, Serve, Terminate, Yield
from autoscale.loop.actuator import Service
from autoscale.loop.drive import Driver
from autoscale.loop.record import head_of, make_loop
from autoscale.loop.signals import RoleLoad, TrainingClaim
from autoscale.providers.provider import Machine
from autoscale.providers.shared import Shared
from cluster.clock import VirtualClock
from cluster.settings.autoscale import AutoscaleSettings
from tests.prove.shared_run import OFFER
from tests.serving.tiny import run

NOTICE_S = 6.0
STEP_S = 2.0  # what a job needs to leave a machine
EMPTY_S = 3.0  # and a replica


@dataclass
class Worked:
    """A job by the protocol, which leaves a machine so long after it was told."""

    clock: VirtualClock
    meant: tuple[str, ...]
    least: int = 1
    leaves_s: dict[str, float] = field(default_factory=dict)
    told: list[tuple[str, float]] = field(default_factory=list)
    step_s: float = STEP_S

    def claim(self) -> TrainingClaim:
        leaving = (name for name, at_s in self.leaves_s.items() if at_s > self.clock.now_s())
        held = tuple(dict.fromkeys((*self.meant, *leaving)))
        return TrainingClaim("j", held, 2, self.least, 0.01, 50.0)

    def give(self, machine: str, notice_s: float) -> None:
        rest = tuple(name for name in self.meant if name != machine)
        if len(rest) < self.least:
            raise ValueError(f"it keeps {machine}")
        if rest != self.meant:
            self.told.append((machine, notice_s))
            self.leaves_s[machine] = self.clock.now_s() + self.step_s
        self.meant = rest

    def take(self, machine: str) -> None:
        if machine not in self.meant:
            self.meant = (*self.meant, machine)


@dataclass
class Replicas:
    """A served model by the protocol. `queued`: what waits."""

    clock: VirtualClock
    on: dict[str, float] = field(default_factory=dict)  # machine -> when it is empty
    queued: int = 0
    named: list[tuple[str, ...]] = field(default_factory=list)
    answers_s: dict[str, float] = field(default_factory=dict)  # machine -> when its replica does
    starts_s: float = 0.0

    def occupied(self, machine_id: str) -> bool:
        return self.on.get(machine_id, -1.0) > self.clock.now_s()

    async def signals(self) -> Service:
        there = [name for name in self.on if self.occupied(name)]
        out = frozenset(name for name in there if self.on[name] < 1e9)
        load = {"decode": RoleLoad(0, self.queued, len(there), 0.0)}
        now_s = self.clock.now_s()
        ready = frozenset(n for n in there if self.answers_s.get(n, 0.0) <= now_s) - out
        return Service(load, dict.fromkeys(there, "decode"), ready, out, ready)

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        self.named.append(tuple(machine_ids))
        for name in [name for name in self.on if name not in machine_ids]:
            await self.drain(name, 0.0)
        fresh = [name for name in machine_ids if not self.occupied(name)]
        self.on |= dict.fromkeys(fresh, 1e9)
        self.answers_s |= dict.fromkeys(fresh, self.clock.now_s() + self.starts_s)

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        if self.on.get(machine_id, 0.0) >= 1e9:
            self.on[machine_id] = self.clock.now_s() + EMPTY_S

    async def yield_machine(self, job: str, machine_id: str) -> None:
        raise AssertionError("jobs are not the served model's matter")

    return_machine = yield_machine


@dataclass
class Rented:
    """A provider whose machines are a list."""

    clock: VirtualClock
    there: dict[str, Machine] = field(default_factory=dict)

    def rent(self, name: str, token: str) -> None:
        self.there[name] = Machine(name, OFFER.name, "running", 0.0, 0.0, None, token)

    def change(self, name: str, **values: Any) -> None:
        old = self.there[name]
        fresh = {f.name: getattr(old, f.name) for f in fields(old)} | values
        self.there[name] = Machine(**fresh)

    async def offers(self) -> list[Any]:
        return [OFFER]

    async def machines(self) -> list[Machine]:
        return list(self.there.values())

    async def events(self, cursor: int) -> tuple[list[Any], int]:
        return [], 0

    async def launch(self, offer: Any, token: str) -> Machine:
        raise AssertionError("the quota is used up")

    async def terminate(self, machine_id: str) -> None:
        self.there.pop(machine_id, None)


class House:
    """Machines a and b are a job's, c is served."""

    def __init__(self, **job: Any) -> None:
        self.clock = VirtualClock()
        self.provider = Rented(self.clock)
        for name, token in (("a", "j/0"), ("b", "j/1"), ("c", "decode/x/1")):
            self.provider.rent(name, token)
        self.job = Worked(self.clock, ("a", "b"), **job)
        self.replicas = Replicas(self.clock, {"c": 1e9})
        self.jobs = {"j": self.job}
        self.shared = Shared(self.replicas, self.jobs, NOTICE_S, self.clock, self.provider)
        self.crowded: list[str] = []
        self.drives: Driver | None = None

    def look(self) -> None:
        """Notes machines that are in two hands."""
        held = self.job.claim().machines
        self.crowded += [name for name in held if self.replicas.occupied(name)]

    async def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            await self.clock.advance(0.1)
            self.look()

    def driver(self, deadline_s: float = 10.0) -> Driver:
        settings = AutoscaleSettings.model_validate(
            {
                "period_s": 0.5,
                "call_deadline_s": deadline_s,
                "up_delay_s": 1.0,
                "down_delay_s": 2.0,
                "backlog_s": 2.0,
                "short_usd_per_h": 100.0,
                "decode": {"floor": 1, "cap": 2, "tokens_per_s": 100.0},
                "prefill": {"cap": 0},
            }
        )
        loop = make_loop(head_of(settings, "x"))
        return Driver(self.provider, self.shared, loop, self.clock, None)


def test_a_job_leaves_before_anybody_else_comes():
    async def work() -> None:
        house = House()
        giving = asyncio.create_task(house.shared.yield_machine("j", "b"))
        await house.pass_s(STEP_S - 0.2)
        assert not giving.done() and house.job.told == [("b", NOTICE_S)]
        await house.shared.set_replicas("decode", ["c", "b"])
        assert house.replicas.named == [("c",)], "the job has not left b yet"
        assert "b" in (await house.shared.signals()).training[0].machines
        await house.pass_s(0.4)
        assert giving.done() and giving.exception() is None
        await house.shared.set_replicas("decode", ["c", "b"])
        assert house.replicas.occupied("b")
        await house.shared.yield_machine("j", "b")
        assert house.job.told == [("b", NOTICE_S)], "told again, it does no more than once"

    run(work())


def test_a_replica_leaves_before_the_job_comes():
    async def work() -> None:
        house = House()
        house.job.give("b", 0.0)
        house.job.leaves_s.clear()
        await house.replicas.set_replicas("decode", ["b", "c"])
        returning = asyncio.create_task(house.shared.return_machine("j", "b"))
        await house.pass_s(EMPTY_S - 0.2)
        assert not returning.done() and list(house.job.meant) == ["a"]
        await house.pass_s(0.4)
        assert returning.done() and list(house.job.meant) == ["a", "b"] and house.crowded == []

    run(work())


def test_what_is_refused():
    async def work() -> None:
        house = House(least=2)
        with pytest.raises(ValueError, match="it keeps b"):
            await house.shared.yield_machine("j", "b")
        with pytest.raises(ValueError, match="no training job 'k' .* there are j"):
            await house.shared.yield_machine("k", "b")
        house.jobs.clear()
        with pytest.raises(ValueError, match="no training job 'j' .* there are none"):
            await house.shared.return_machine("j", "b")
        assert (await house.shared.signals()).training == ()

    run(work())


def test_a_job_is_told_what_the_provider_takes():
    async def work() -> None:
        house = House()
        await house.pass_s(1.0)
        house.provider.change("b", state="draining", doomed_s=house.clock.now_s() + 4.5)
        for _ in range(2):
            await house.shared.signals()
        [(machine, notice_s)] = house.job.told
        assert machine == "b" and notice_s == pytest.approx(4.5)
        house.provider.change("a", state="gone")
        await house.shared.signals()  # it needs one: it is not asked to do without
        assert house.job.meant == ("a",)

    run(work())


async def spike(house: House, deadline_s: float = 10.0) -> list[Any]:
    """Twenty seconds with work that waits, then twenty without; what the loop did."""
    house.drives = house.driver(deadline_s)
    done = [await lap(house, 500 if 4 <= number < 40 else 0) for number in range(80)]
    return [(number, action) for number, actions in enumerate(done) for action in actions]


async def quiet(house: House, laps: int) -> list[Any]:
    """And so long without any work."""
    return [(0, action) for _ in range(laps) for action in await lap(house, 0)]


async def lap(house: House, queued: int) -> Sequence[Any]:
    """One step of the loop and half a second more."""
    assert house.drives
    house.replicas.queued = queued
    once = asyncio.create_task(house.drives.once())
    while not once.done():
        await house.pass_s(0.1)
    decision = once.result()
    assert decision is not None
    await house.pass_s(0.5)
    return decision.actions


def acts(done: list[Any], kind: type[Any]) -> list[Any]:
    return [action.machine for _, action in done if isinstance(action, kind)]


def test_a_machine_is_lent_and_returned_by_the_loop():
    async def work() -> None:
        house = House()
        done = await spike(house)
        assert acts(done, Yield) == ["b"]
        assert len(set(acts(done, Return))) == 1 and len(house.job.meant) == 2
        assert [name for name in "abc" if house.replicas.occupied(name)] != []
        served = [a.machines for _, a in done if isinstance(a, Serve)]
        assert max(map(len, served)) == 2 and house.crowded == []

    run(work())


def test_a_job_that_may_not_yield_leaves_serving_short():
    """The mutation: without a machine to spare nothing is lent."""

    async def work() -> None:
        house = House(least=2)
        done = await spike(house)
        assert acts(done, Yield) == [] and house.job.meant == ("a", "b")
        assert all(a.machines == ("c",) for _, a in done if isinstance(a, Serve))

    run(work())


def test_a_step_longer_than_a_call_may_take_delays_the_replica():
    """The call gives up first; nobody comes until the worker has left, and then somebody does."""

    async def work() -> None:
        house = House(step_s=5.0)
        done = await spike(house, deadline_s=1.0)
        assert set(acts(done, Yield)) == {"b"} and len(acts(done, Yield)) > 1
        assert len(house.job.told) == 1 and house.crowded == []
        assert len(house.replicas.named[-1]) == 1 and max(map(len, house.replicas.named)) == 2

    run(work())


@pytest.mark.parametrize("slow", [{"starts_s": 60.0}, {"step_s": 45.0}], ids=["replica", "job"])
def test_a_machine_that_never_served_goes_back(slow: dict[str, float]):
    """The need is over before the replica answers, or before the job has let go."""

    async def work() -> None:
        house = House()
        house.replicas.starts_s = slow.get("starts_s", 0.0)
        house.job.step_s = slow.get("step_s", STEP_S)
        done = await spike(house, deadline_s=1.0)
        assert set(acts(done, Yield)) == {"b"} and acts(done, Terminate) == []
        done += await quiet(house, 40)
        assert set(acts(done, Return)) == {"b"} and house.job.meant == ("a", "b")
        assert house.crowded == []

    run(work())


def test_without_the_wait_a_machine_would_be_in_two_hands():
    """The mutation of the guard: what the loop names is served at once."""

    class Careless(Shared):
        async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
            await self.serving.set_replicas(role, machine_ids)

    async def work() -> None:
        house = House(step_s=5.0)
        house.shared = Careless(house.replicas, house.jobs, NOTICE_S, house.clock, house.provider)
        await spike(house, deadline_s=1.0)
        assert house.crowded != []

    run(work())
