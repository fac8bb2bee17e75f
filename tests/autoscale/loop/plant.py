"""A service and a cloud for the loop's tests, as small as they can be: tokens wait in a pool and
replicas drain it at a steady rate; machines start after a while; faults come when they are told to.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Decision
from autoscale.loop.actuator import Service
from autoscale.loop.drive import Driver, Log
from autoscale.loop.signals import RoleLoad, Signals, TrainingClaim
from autoscale.loop.step import Loop
from autoscale.providers.provider import LaunchRefused, Machine
from autoscale.simulate.rented import SteppedClock
from autoscale.spot.basic import OnDemandPolicy, Refusals
from autoscale.spot.events import SpotEvent
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale, RoleScale

RATE = 100.0  # tokens/s of one replica
PERIOD_S = 20.0
T = TypeVar("T")
Fault = Literal["fails", "hangs", "lost answer"]
Load = Callable[[float], float]  # time -> tokens/s


def offer(name: str = "od", market: str = "on_demand", usd: float = 1.0, **more: Any) -> Offer:
    values = {"startup_s": 60.0, **more}
    return Offer(name, "g", 1, "r", "z", market, usd, **values)  # type: ignore[arg-type]


def settings(**more: Any) -> AutoscaleSettings:
    """Quick delays; decode from 1 to 16 replicas of RATE, prefill off."""
    values: dict[str, Any] = {
        "period_s": PERIOD_S,
        "up_delay_s": 40.0,
        "down_delay_s": 200.0,
        "zero_after_s": 300.0,
        "give_up_s": 300.0,
        "decode": DecodeScale(floor=1, cap=16, tokens_per_s=RATE),
        "prefill": RoleScale(cap=0),
    }
    return AutoscaleSettings(**{**values, **more})


class Cloud:
    """A provider whose faults are told by name of the call: taken once, when the call is next
    made."""

    def __init__(self, clock: SteppedClock, offers: Sequence[Offer]) -> None:
        self.clock, self.sale = clock, list(offers)
        self.faults: dict[str, list[Fault]] = {}
        self.rented: dict[str, Machine] = {}
        self.told: list[SpotEvent] = []
        self.empty: set[str] = set()  # offers that are refused
        self.slow: set[str] = set()  # offers whose machines stay pending
        self.launches = 0
        self.beyond_quota = 0  # launches asked for beyond it

    async def offers(self) -> Sequence[Offer]:
        return await self._answer("offers", lambda: tuple(self.sale))

    async def machines(self) -> Sequence[Machine]:
        return await self._answer("machines", lambda: tuple(self.rented.values()))

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        return await self._answer("events", lambda: (self.told[cursor:], len(self.told)))

    async def launch(self, offer: Offer, token: str) -> Machine:
        return await self._answer("launch", lambda: self._made(offer, token))

    async def terminate(self, machine_id: str) -> None:
        await self._answer("terminate", lambda: self.rented.pop(machine_id, None))

    def lose(self, machine: str) -> None:
        self.rented.pop(machine)

    def doom(self, machine: str, notice_s: float) -> None:
        doomed_s = self.clock.time_s + notice_s
        self.rented[machine] = replace(self.rented[machine], state="draining", doomed_s=doomed_s)

    def pass_time(self) -> None:
        for name, machine in list(self.rented.items()):
            if machine.doomed_s is not None and machine.doomed_s <= self.clock.time_s:
                self.lose(name)

    def _made(self, offer: Offer, token: str) -> Machine:
        for machine in self.rented.values():
            if machine.token == token:
                return machine
        if offer.name in self.empty:
            raise LaunchRefused("capacity", 0.0, "none")
        held = sum(machine.offer == offer.name for machine in self.rented.values())
        if offer.quota is not None and held >= offer.quota:
            self.beyond_quota += 1
            raise LaunchRefused("quota", 0.0, "quota")
        self.launches += 1
        state: Any = "pending" if offer.name in self.slow else "running"
        now_s = self.clock.time_s
        machine = Machine(f"m{self.launches}", offer.name, state, now_s, now_s, None, token)
        self.rented[machine.id] = machine
        return machine

    async def _answer(self, call: str, effect: Callable[[], T]) -> T:
        return await faulty(self.faults, call, effect)


async def faulty(faults: dict[str, list[Fault]], call: str, effect: Callable[[], T]) -> T:
    """What the call does, or the next fault that is due for it."""
    due = faults.get(call)
    if not due:
        return effect()
    fault = due.pop(0)
    if fault == "lost answer":
        effect()
    if fault == "hangs":
        await asyncio.Event().wait()
    raise ConnectionError(f"{call}: {fault}")


@dataclass
class Pool:
    """The work of one role."""

    rate: Load
    arrived: float = 0.0
    queued: float = 0.0


@dataclass
class Served:
    """An actuator over pools of tokens."""

    cloud: Cloud
    pools: Mapping[str, Pool]
    claims: dict[str, TrainingClaim] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    drained: list[str] = field(default_factory=list)

    async def signals(self) -> Service:
        return await faulty(self.faults, "signals", self._service)

    async def set_replicas(self, role: str, machine_ids: Sequence[str]) -> None:
        await faulty(self.faults, "set_replicas", lambda: self._set(role, machine_ids))

    async def drain(self, machine_id: str, deadline_s: float) -> None:
        assert deadline_s > self.cloud.clock.time_s
        self.drained.append(machine_id)
        await faulty(self.faults, "drain", lambda: self.leaving.add(machine_id))

    async def yield_machine(self, job: str, machine_id: str) -> None:
        await faulty(self.faults, "yield", lambda: self._move(job, machine_id, gives=True))

    async def return_machine(self, job: str, machine_id: str) -> None:
        self.roles.pop(machine_id, None)
        self.leaving.discard(machine_id)
        await faulty(self.faults, "return", lambda: self._move(job, machine_id, gives=False))

    def answering(self, role: str) -> int:
        """Replicas that take work now, on machines that are there."""
        return sum(
            self.roles[name] == role
            and self.ready_s[name] <= self.cloud.clock.time_s
            and name not in self.leaving
            for name in self.roles
            if name in self.cloud.rented
        )

    def advance(self, from_s: float, step_s: float) -> None:
        for role, pool in self.pools.items():
            coming = pool.rate(from_s) * step_s
            pool.arrived += coming
            pool.queued = max(0.0, pool.queued + coming - self.answering(role) * RATE * step_s)
        for name in [name for name in self.roles if name not in self.cloud.rented]:
            del self.roles[name]
            self.leaving.discard(name)

    def _service(self) -> Service:
        load = {}
        for role, pool in self.pools.items():
            running = self.answering(role) if pool.queued > 0 else 0
            load[role] = RoleLoad(round(pool.arrived), round(pool.queued), running, 0.0)
            pool.arrived = 0.0
        there = {name: role for name, role in self.roles.items() if name in self.cloud.rented}
        ready = {name for name in there if self.ready_s[name] <= self.cloud.clock.time_s}
        leaving = frozenset(self.leaving & there.keys())
        claims = tuple(self.claims.values())
        return Service(load, there, frozenset(ready) - leaving, leaving, leaving, claims)

    def _set(self, role: str, machine_ids: Sequence[str]) -> None:
        for name in machine_ids:
            machine = self.cloud.rented.get(name)
            if machine is not None and name not in self.roles:
                self.roles[name] = role
                starts_s = next(o.startup_s for o in self.cloud.sale if o.name == machine.offer)
                self.ready_s[name] = max(self.cloud.clock.time_s, machine.launched_s + starts_s)
        for name in [n for n, r in self.roles.items() if r == role and n not in machine_ids]:
            if name not in self.leaving:
                del self.roles[name]

    def _move(self, job: str, machine: str, *, gives: bool) -> None:
        claim = self.claims[job]
        others = tuple(name for name in claim.machines if name != machine)
        self.claims[job] = replace(claim, machines=others if gives else (*others, machine))


@dataclass
class Kept:
    """A log in memory."""

    steps: list[tuple[Signals, Decision]] = field(default_factory=list)

    def note(self, signals: Signals, decision: Decision) -> None:
        self.steps.append((signals, decision))


@dataclass
class Plant:
    """Loop, driver, cloud and service over stepped time."""

    load: Load
    settings: AutoscaleSettings
    offers: Sequence[Offer] = (offer(),)
    loop: Loop | None = None
    log: Log | None = None
    prefill: Load | None = None
    clock: SteppedClock = field(default_factory=SteppedClock)
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cloud = Cloud(self.clock, self.offers)
        pools = {"decode": Pool(self.load)}
        if self.prefill is not None:
            pools["prefill"] = Pool(self.prefill)
        self.service = Served(self.cloud, pools)
        self.loop = self.loop or Loop(self.settings, OnDemandPolicy(), Refusals(), "t")
        self.driver = Driver(self.cloud, self.service, self.loop, self.clock, self.log)

    def run(self, steps: int, each: Callable[["Plant"], None] = lambda plant: None) -> "Plant":
        """So many periods; `each` looks at it (or breaks something) before every one."""

        async def going() -> None:
            for _ in range(steps):
                begun_s = self.clock.time_s + PERIOD_S
                self.clock.time_s = begun_s
                self.cloud.pass_time()
                each(self)
                decision = await self.driver.once()
                if decision is not None:
                    self.decisions.append(decision)
                left_s = max(PERIOD_S, self.clock.time_s - begun_s)
                self.service.advance(begun_s, left_s)

        asyncio.run(going())
        return self

    def needs(self, role: str = "decode") -> list[int]:
        return [decision.needs[role].need for decision in self.decisions]

    def acts(self, kind: str) -> list[Any]:
        return [act for decision in self.decisions for act in decision.actions if act.act == kind]


def turns(values: Sequence[int]) -> int:
    """How often a series changes its direction."""
    moves = [b > a for a, b in zip(values, values[1:], strict=False) if a != b]
    return sum(a != b for a, b in zip(moves, moves[1:], strict=False))


def whole(tokens_per_s: float, filled: float) -> int:
    """Replicas for a steady load, by hand."""
    return math.ceil(tokens_per_s / (RATE * filled) - 1e-9)
