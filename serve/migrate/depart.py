"""Leaving before a deadline: run on while that helps, then move what is left, then drop the rest.

Until half the time is over, or so little is left that the moves may take a LEADth of it, requests
just go on: some finish, and the tokens of the others count. Then the plan is made anew before every
move, with the link as fast as the moves so far have shown it: the first of its moves is parked, its
ingress is told where, and a few are under way at a time. What the plan would have computed again
runs here until the end, for a later plan may have room for it. Nothing is moved while no other
replica is ready to take it. Called by decode.py.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.engine.engine import Engine, movable_tokens
from serve.engine.sequence import Parked, Sequence
from serve.jobs import Jobs
from serve.kv.device import Storage
from serve.migrate import codec
from serve.migrate.keep import KeepPolicy
from serve.migrate.parking import Parking
from serve.migrate.plan import Carried, Movable, Plan, Step, Terms, plan
from serve.replica import between_steps

LOOK_S = 0.02
UNDER_WAY = 4  # moves at a time: the messages of one travel while another's pages are copied
STUCK_S = 2.0  # a move that takes longer has nobody to take it yet, and holds up no other
MOVE_S = 0.02  # of messages for each move, beside a step
LEAD = 3.0  # times the planned link time: when to begin at the latest
LAST_SHARE = 0.1  # of the time, at most LAST_S: kept for whatever is late
LAST_S = 1.0
CODEC_BYTES_PER_S = 3e8  # one core packing or unpacking floats, an order of magnitude
LEAST_TOKEN_S = 1e-7  # where the clock has seen no step take any time


@dataclass(frozen=True)
class Rules:
    """What may be done (settings section [migrate]). pages: False has all computed again."""

    pages: bool
    lossy: bool
    keep: KeepPolicy
    link_bytes_per_s: float


@dataclass
class _Link:
    """How long moves took beside what was planned for them."""

    began_s: float | None = None
    planned_s: float = 0.0
    slowness: float = 1.0

    def took(self, planned_s: float, now_s: float) -> None:
        """A move has ended."""
        assert self.began_s is not None
        self.planned_s += planned_s
        seen = (now_s - self.began_s) / self.planned_s
        self.slowness = min(max(seen, 0.1), 100.0)


@dataclass
class Departure:
    """One drain of one replica. elsewhere: whether another one is ready to take a request."""

    jobs: Jobs
    parking: Parking
    storage: Storage
    rules: Rules
    elsewhere: Callable[[], bool]
    _under_way: dict[str, tuple[Step, float]] = field(default_factory=dict)  # by lease
    _link: _Link = field(default_factory=_Link)

    async def run(self, deadline_s: float) -> int:
        """Leave within `deadline_s`; how many requests went on elsewhere."""
        clock, jobs = self.jobs.clock, self.jobs
        end_s = clock.now_s() + deadline_s
        last_s = end_s - min(LAST_SHARE * deadline_s, LAST_S)
        moved, begun = 0, False
        while jobs and (left_s := last_s - clock.now_s()) > 0:
            self._note_ended()
            if not self.rules.pages or not self.elsewhere():
                await clock.sleep(LOOK_S)
                continue
            made = await self._plan(left_s)
            if made is None:
                break
            begun = begun or left_s < max(deadline_s / 2, LEAD * made.link_s)
            gone = await self._move(made, end_s) if begun else 0
            moved += gone
            await clock.sleep(0 if gone else LOOK_S)
        moved += await jobs.send_away(list(jobs))
        await self._wait_for_takers(end_s)
        return moved

    async def _plan(self, left_s: float) -> Plan | None:
        """What to do with every sequence that has something to take along; None when the engine
        takes longer than is left to say what it has."""
        terms, pending_s = self._terms(), sum(step.link_s for step, _ in self._under_way.values())
        try:
            async with asyncio.timeout(left_s):
                movable = await between_steps(self.jobs.loop, self._movable)
        except TimeoutError:
            return None
        return plan(movable, terms, left_s - pending_s)

    def _terms(self) -> Terms:
        """Each move waits for a step here and there, and several are under way: about one each."""
        slowness, token_s = self._link.slowness, self._token_s()
        step_s = self.jobs.loop.pace.step_s(len(self.jobs))
        return Terms(
            self.rules.link_bytes_per_s / slowness,
            (MOVE_S + step_s) * slowness,
            1 / token_s,
            CODEC_BYTES_PER_S,
        )

    def _token_s(self) -> float:
        """Of a prompt that is computed in full steps: replicas are alike, so here is as there."""
        pace, budget = self.jobs.loop.pace, self.jobs.loop.engine.scheduler.budget_tokens
        return max(pace.step_s(budget) / budget, LEAST_TOKEN_S)

    def _movable(self, engine: Engine) -> list[Movable]:
        """On the engine's thread: the running sequences and what may be done with them."""
        scheduler, pace = engine.scheduler, self.jobs.loop.pace
        running = [s for s in scheduler.running if movable_tokens(s)]
        cost = sum(scheduler.cost.of(s.computed_tokens, s.computed_tokens + 1) for s in running)
        step_s = max(pace.step_s(cost), LEAST_TOKEN_S)
        return [self._one(engine, sequence, step_s) for sequence in running]

    def _one(self, engine: Engine, sequence: Sequence, step_s: float) -> Movable:
        request, tokens = sequence.request, sequence.computed_tokens
        size, cost = self.storage.shape.page_tokens, engine.scheduler.cost
        to_come = request.limits.max_tokens - len(sequence.output)
        to_come += round(cost.of(tokens, len(sequence)) * self._token_s() / step_s)
        carried: dict[Carried, int] = {"pages": tokens * self.storage.token_bytes}
        kept = self.rules.keep.kept_tokens(tokens)
        if kept < tokens:
            carried["kept"] = kept * self.storage.token_bytes
        if self.rules.lossy:
            padded = -(-tokens // size) * size
            for choice in codec.choices(self.storage.kv_format):
                carried[choice] = padded * codec.token_bytes(self.storage.shape, choice)
        again = cost.of(0, tokens)
        return Movable(request.request_id, again, to_come, 1 / step_s, carried)

    async def _move(self, made: Plan, end_s: float) -> int:
        """Send away what has nothing to take along, and the next moves of the plan on their way."""
        planned = {step.request_id for step in made.steps}
        empty = [r for r in self.jobs if r not in planned]
        gone = await self.jobs.send_away(empty) if empty else 0
        steps, clock = made.moves[: self._room()], self.jobs.clock
        if not steps:
            return gone
        began_s = clock.now_s()
        every = await between_steps(
            self.jobs.loop, lambda engine: [self._park(engine, step, end_s) for step in steps]
        )
        self._link.began_s = began_s if self._link.began_s is None else self._link.began_s
        for step, parked in zip(steps, every, strict=True):
            if parked is not None:  # else it has finished meanwhile, or lost its pages
                self._under_way[parked.lease_id] = (step, clock.now_s())
                self.jobs.leave(step.request_id, parked)
                gone += 1
        return gone

    def _park(self, engine: Engine, step: Step, end_s: float) -> Parked | None:
        assert step.choice in ("pages", "kept", "int8", "int4"), step
        lease_s = end_s - self.jobs.clock.now_s()
        return self.parking.park(engine, step.request_id, step.choice, lease_s)

    def _room(self) -> int:
        """How many more moves may be under way."""
        now_s = self.jobs.clock.now_s()
        fresh = sum(now_s - at_s < STUCK_S for _, at_s in self._under_way.values())
        return max(0, UNDER_WAY - fresh)

    def _note_ended(self) -> None:
        """Learn from the moves that have ended since the last look."""
        for lease_id in [x for x in self._under_way if not self.parking.leases.holds(x)]:
            step, _ = self._under_way.pop(lease_id)
            self._link.took(step.link_s, self.jobs.clock.now_s())

    async def _wait_for_takers(self, end_s: float) -> None:
        """Keep what is parked until it is taken, or the time is over; then nothing is."""
        clock, leases = self.jobs.clock, self.parking.leases
        while len(leases) and clock.now_s() < end_s:
            await clock.sleep(LOOK_S)
        with contextlib.suppress(TimeoutError):  # an engine in a long step: its process ends anyway
            async with asyncio.timeout(LAST_S):
                await between_steps(self.jobs.loop, lambda _: leases.sweep())
