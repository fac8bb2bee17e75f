"""The driver: reads the signals, lets the loop decide, and has it done.

Every call has a deadline on the clock that was handed in, and may fail: a launch whose answer is
lost is asked for again under its token, everything else is decided again from what is there.
Without the list of machines nothing is decided; without the service's word, needs stay as they
were. What happened before the driver began is not told to the loop: it sees what is there.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Action, Decision, Drain, Launch, Return, Serve, Terminate, Yield
from autoscale.loop.actuator import Actuator, Service
from autoscale.loop.signals import Answer, Held, Phase, RoleLoad, Signals
from autoscale.loop.step import ROLES, Loop
from autoscale.loop.turn import TRAINING
from autoscale.providers.provider import LaunchRefused, Machine, Provider
from autoscale.spot.events import SpotEvent
from cluster.clock import Clock

LOG = logging.getLogger(__name__)
T = TypeVar("T")
NOTHING = Service({}, {}, frozenset(), frozenset(), frozenset())


class Log(Protocol):
    """Where steps are noted, before they are carried out."""

    def note(self, signals: Signals, decision: Decision) -> None: ...


class NoLog:
    """Notes nothing."""

    def note(self, signals: Signals, decision: Decision) -> None:
        pass


class Driver:
    """Runs one loop over one provider and one service."""

    def __init__(
        self, provider: Provider, actuator: Actuator, loop: Loop, clock: Clock, log: Log | None
    ) -> None:
        self.loop, self.state = loop, loop.start()
        self._provider, self._actuator, self._clock = provider, actuator, clock
        self._log: Log = log or NoLog()
        self._deadline_s = loop.settings.call_deadline_s
        self._cursor, self._begun_s = 0, clock.now_s()
        self._untold: list[SpotEvent] = []
        self._offers: tuple[Offer, ...] = ()
        self._service = NOTHING
        self._answers: tuple[Answer, ...] = ()

    async def run(self, stop: asyncio.Event) -> None:
        """One step each period, until `stop` is set. What fails is logged and tried again."""
        while not stop.is_set():
            begun_s = self._clock.now_s()
            try:
                await self.once()
            except Exception:  # a defect of one step must not end all of them
                LOG.exception("a step of the control loop failed")
            rest_s = self.loop.settings.period_s - (self._clock.now_s() - begun_s)
            await self._pause(stop, max(0.001, rest_s))

    async def _pause(self, stop: asyncio.Event, rest_s: float) -> None:
        waiting = [asyncio.ensure_future(stop.wait())]
        waiting.append(asyncio.ensure_future(self._clock.sleep(rest_s)))  # type: ignore[arg-type]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    def load(self, role: str) -> RoleLoad | None:
        """The role's load as last heard of."""
        return self._service.load.get(role)

    async def once(self) -> Decision | None:
        """One step; None where the machines could not be listed."""
        signals = await self._signals()
        if signals is None:
            return None
        self.state, decision = self.loop.step(self.state, signals)
        self._untold = []
        self._log.note(signals, decision)
        await self._carry_out(decision.actions)
        return decision

    async def _signals(self) -> Signals | None:
        machines, told, offers, service = await asyncio.gather(
            self._within("machines", self._provider.machines()),
            self._within("events", self._provider.events(self._cursor)),
            self._within("offers", self._provider.offers()),
            self._within("signals", self._actuator.signals()),
        )
        if told is not None:
            events, self._cursor = told
            self._untold += [event for event in events if event.t_s >= self._begun_s]
        if offers is not None:
            self._offers = tuple(offers)
        if service is not None:
            self._service = service
        if machines is None:
            LOG.warning("the machines could not be listed: nothing is decided this time")
            return None
        load = (
            {} if service is None else {role: service.load[role] for role in sorted(service.load)}
        )
        there = sorted(
            (machine for machine in machines if machine.state != "gone"),
            key=lambda machine: (machine.launched_s, machine.id),
        )
        return Signals(
            self._clock.now_s(),
            load,
            held(there, self._service),
            tuple(self._untold),
            self._offers,
            self._answers,
            self._service.training,
        )

    async def _carry_out(self, actions: Sequence[Action]) -> None:
        """Launches beside the rest, which goes in its order, kind by kind."""
        launches = [act for act in actions if isinstance(act, Launch)]
        rest = [act for act in actions if not isinstance(act, Launch)]
        answers, _ = await asyncio.gather(
            asyncio.gather(*(self._launch(act) for act in launches)), self._others(rest)
        )
        self._answers = tuple(answers)

    async def _others(self, actions: Sequence[Action]) -> None:
        for act in dict.fromkeys(action.act for action in actions):
            same = [action for action in actions if action.act == act]
            await asyncio.gather(*(self._within(act, self._do(action)) for action in same))

    async def _launch(self, act: Launch) -> Answer:
        offer = next((offer for offer in self._offers if offer.name == act.offer), None)
        if offer is None:
            return Answer(act.token, act.offer, "invalid", None)
        try:
            await in_time(self._clock, self._deadline_s, self._provider.launch(offer, act.token))
        except LaunchRefused as refused:
            retry_s = refused.retry_s if math.isfinite(refused.retry_s) else None
            return Answer(act.token, act.offer, refused.kind, retry_s)
        except Exception as error:  # whatever it was, its effect is unknown
            LOG.warning("launch %s of %s: %s", act.token, act.offer, error or type(error).__name__)
            return Answer(act.token, act.offer, "failed")
        return Answer(act.token, act.offer, "launched")

    def _do(self, action: Action) -> Coroutine[Any, Any, None]:
        match action:
            case Serve(role=role, machines=machines):
                return self._actuator.set_replicas(role, machines)
            case Drain(machine=machine, deadline_s=deadline_s):
                return self._actuator.drain(machine, deadline_s)
            case Terminate(machine=machine):
                return self._provider.terminate(machine)
            case Yield(job=job, machine=machine):
                return self._actuator.yield_machine(job, machine)
            case Return(job=job, machine=machine):
                return self._actuator.return_machine(job, machine)
        return _say(action)

    async def _within(self, name: str, call: Coroutine[Any, Any, T]) -> T | None:
        """None when it failed or took too long."""
        try:
            return await in_time(self._clock, self._deadline_s, call)
        except Exception as error:  # of a cloud or a service: anything
            LOG.warning("%s: %s", name, error or type(error).__name__)
            return None


async def _say(action: Action) -> None:
    LOG.warning("%s", action)


async def in_time(clock: Clock, deadline_s: float, call: Coroutine[Any, Any, T]) -> T:
    """What the call returns or raises; TimeoutError (and the call is cancelled) after deadline_s of
    the clock."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    if task.done():
        return task.result()
    timer: Awaitable[None] = asyncio.ensure_future(clock.sleep(deadline_s))
    try:
        await asyncio.wait((task, timer), return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        if not task.done():
            raise TimeoutError(f"no answer within {deadline_s:g} s")
        return task.result()
    finally:
        task.cancel()
        timer.cancel()  # type: ignore[attr-defined]


def held(machines: Sequence[Machine], service: Service) -> tuple[Held, ...]:
    """Machines as the loop sees them: what the provider says of them, and what the service does."""
    jobs = {machine: claim.job for claim in service.training for machine in claim.machines}
    return tuple(_held(machine, service, jobs.get(machine.id)) for machine in machines)


def _held(machine: Machine, service: Service, job: str | None) -> Held:
    role = f"{TRAINING}{job}" if job is not None else service.roles.get(machine.id, "")
    phase: Phase = "pending" if machine.state == "pending" else "starting"
    if machine.id in service.draining:
        phase = "draining"
    elif machine.id in service.ready:
        phase = "ready"
    return Held(
        machine.id,
        machine.offer,
        role or role_of(machine.token),
        phase,
        machine.launched_s,
        machine.ready_s,
        machine.doomed_s,
        machine.token,
        serving=job is None and machine.id in service.roles,
        idle=machine.id in service.idle,
    )


def role_of(token: str) -> str:
    """What a machine was launched for, from its token; "" where the token is not one of ours."""
    role, _, rest = token.partition("/")
    return role if rest and role in ROLES else ""
