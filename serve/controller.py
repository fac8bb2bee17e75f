"""The controller: keeps as many replicas of each role as were asked for, and says who they are.

One task watches each replica; a replica that dies, hangs or fails is removed and another started,
later and later when those of a role keep failing. It holds no state that it could not find again:
after a crash of its own it lists the replicas that run and goes on. Whatever a launcher raises is
taken as the trouble of the replica in question. A role may be placed on named machines instead of
counted: then it has one replica on each, and none elsewhere. No Ray here; actors.py gives it a
launcher and a process.
"""

import asyncio
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from cluster.clock import Clock
from serve.clients import ReplicaLost
from serve.directory import Directory, Entry
from serve.places import machine_of, on_machine
from serve.state import ReplicaState, Role

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 30.0  # a replica that served for so long before it failed is no repeated failure
SILENT_PINGS = 3  # ping deadlines that an engine may take for one step; a busy machine is no fault
STOP_S = 10.0  # for a launcher to stop one replica


class Launcher(Protocol):
    """Starts and stops replicas somewhere: Ray actors, or objects of this process."""

    async def start(self, role: Role, replica_id: str) -> None:
        """Begin to start a replica, on the machine that its id names if it does (serve.places); it
        is up when its first ping is answered."""
        ...

    async def ping(self, replica_id: str) -> ReplicaState:
        """Its state, as soon as it answers; ReplicaLost, with the reason, when it is dead."""
        ...

    async def drain(self, replica_id: str, deadline_s: float) -> int:
        """Let it finish or send away what it has; returns how many requests had to move."""
        ...

    async def stop(self, replica_id: str) -> None:
        """Kill it and clear what it left (shared memory); idempotent."""
        ...

    async def running(self) -> Mapping[str, Role]:
        """Every replica of this service that exists, whoever started it."""
        ...


class Slot(NamedTuple):
    """Where replicas fail and are waited for: a role, on a machine where it is placed on some."""

    role: Role
    machine: str


@dataclass(frozen=True)
class Patience:
    """How often to look and how long to wait, in seconds (settings section [controller])."""

    period_s: float
    ping_deadline_s: float
    start_deadline_s: float


class Controller:
    """Watches and replaces replicas; every method runs on one event loop."""

    def __init__(
        self, launcher: Launcher, wanted: Mapping[Role, int], patience: Patience, clock: Clock
    ) -> None:
        self.launcher = launcher
        self.wanted: dict[Role, int] = dict(wanted)
        self.patience = patience
        self.clock = clock
        self.replaced = 0
        self.trouble: str | None = None
        self.closing = False
        self._entries: dict[str, Entry] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._ready_s: dict[str, float] = {}
        self._version = 1
        self._published = asyncio.Event()
        self._machines: dict[Role, tuple[str, ...]] = {}
        self._failures: Counter[Slot] = Counter()  # in a row
        self._start_at_s: dict[Slot, float] = {}
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Find the replicas that run already, then start what is missing."""
        for replica_id, role in (await self.launcher.running()).items():
            self._watch(Entry(replica_id, role, "starting"))
        await self._fill()

    async def stop(self) -> None:
        """Stop every replica and every task; idempotent."""
        for task in (*self._watchers.values(), *self._background):
            task.cancel()
        self.wanted = dict.fromkeys(self.wanted, 0)
        replicas, self._entries = list(self._entries), {}
        await asyncio.gather(*(self._stop(r) for r in replicas))

    def directory(self) -> Directory:
        """Who serves now."""
        entries = tuple(self._entries.values())
        return Directory(self._version, entries, self.trouble, self.closing)

    async def watch(self, version: int, timeout_s: float) -> Directory:
        """The directory as soon as it is newer than `version`, or as it is after `timeout_s`."""
        if version > self._version:  # the caller knew a predecessor of ours: go on from there
            self._version = version + 1
        if version == self._version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._published.wait()
        return self.directory()

    def close(self) -> None:
        """Tell everybody that the service is being taken down; what is open may finish."""
        self.closing = True
        self._publish()

    async def scale(self, role: Role, replicas: int, deadline_s: float) -> None:
        """Want so many replicas of a role; those too many, newest first, are drained."""
        self.wanted[role] = replicas
        self._machines.pop(role, None)
        serving = [e.replica_id for e in self._entries.values() if _counts(e, role)]
        for replica_id in serving[replicas:]:
            self._drain_later(replica_id, deadline_s)
        await self._fill()

    async def place(self, role: Role, machines: Sequence[str], drain_s: float = 0.0) -> None:
        """Want one replica of a role on each of these machines, and none elsewhere.

        Those elsewhere take nothing new, have drain_s to finish and stop. A draining one goes on
        draining, and a machine that is named again gets a replica once it is empty.
        """
        self._machines[role] = tuple(dict.fromkeys(machines))
        self.wanted[role] = len(self._machines[role])
        for entry in list(self._entries.values()):
            if _counts(entry, role) and machine_of(entry.replica_id) not in self._machines[role]:
                self._drain_later(entry.replica_id, drain_s)
        await self._fill()

    async def leave(self, machine: str, deadline_s: float) -> None:
        """Place nothing on a machine any more, and drain what is there, if anything is. Returns at
        once. Idempotent; of several deadlines the first one counts."""
        for role, machines in self._machines.items():
            self._machines[role] = tuple(name for name in machines if name != machine)
            self.wanted[role] = len(self._machines[role])
        for entry in list(self._entries.values()):
            if machine_of(entry.replica_id) != machine:
                continue
            if entry.phase == "draining":  # it waits for the drain that goes on already
                self._later(self._hurry(entry.replica_id, deadline_s))
            else:
                self._drain_later(entry.replica_id, deadline_s)

    async def _hurry(self, replica_id: str, deadline_s: float) -> None:
        with contextlib.suppress(Exception):  # whoever began the drain hears of it
            await self.launcher.drain(replica_id, deadline_s)

    async def drain(self, replica_id: str, deadline_s: float) -> None:
        """Route nothing new to a replica, let it finish or move its work, then stop it.

        A replacement is started first when the role would fall short. ValueError when unknown.
        """
        if replica_id not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none"
            raise ValueError(f"there is no replica {replica_id!r}; running are: {known}")
        self._route_around(replica_id)
        await self._finish_drain(replica_id, deadline_s)

    def _drain_later(self, replica_id: str, deadline_s: float) -> None:
        """Take a replica out of routing at once, and let it finish in the background."""
        self._route_around(replica_id)
        self._later(self._finish_drain(replica_id, deadline_s))

    def _route_around(self, replica_id: str) -> None:
        self._entries[replica_id] = replace(self._entries[replica_id], phase="draining")
        self._publish()

    async def _finish_drain(self, replica_id: str, deadline_s: float) -> None:
        await self._fill()
        try:
            async with asyncio.timeout(deadline_s + self.patience.ping_deadline_s):
                await self.launcher.drain(replica_id, deadline_s)
        except Exception as error:  # it is stopped all the same; its requests go on elsewhere
            self.trouble = f"{replica_id} was not drained: {_sentence(error)}"
        await self._remove(replica_id)

    def _watch(self, entry: Entry) -> None:
        self._entries[entry.replica_id] = entry
        self._watchers[entry.replica_id] = asyncio.create_task(self._look_after(entry))
        self._publish()

    async def _look_after(self, entry: Entry) -> None:
        """Ping one replica until it is lost, then replace it."""
        replica_id, deadline_s = entry.replica_id, self.patience.start_deadline_s
        try:
            while True:
                async with asyncio.timeout(deadline_s):
                    state = await self.launcher.ping(replica_id)
                self._saw(replica_id, state)
                deadline_s = self.patience.ping_deadline_s
                await self.clock.sleep(self.patience.period_s)
        except TimeoutError:
            self.trouble = f"{replica_id} did not answer within {deadline_s:g} s"
        except Exception as error:
            self.trouble = f"{replica_id}: {_sentence(error)}"
        self._watchers.pop(replica_id, None)
        slot = _slot(entry)
        if self._is_wanted(slot):
            self.replaced += 1
            if self._served_s(replica_id) >= STEADY_S:
                self._failures[slot] = 0
            self._count_failure(slot)
        await self._remove(replica_id)
        await self._fill_in_time(slot)

    def _saw(self, replica_id: str, state: ReplicaState) -> None:
        """Take in an answer; ReplicaLost when it says that the replica can serve no more."""
        entry = self._entries[replica_id]
        if state.failure is not None:
            raise ReplicaLost(state.failure)
        if state.silent_s > SILENT_PINGS * self.patience.ping_deadline_s:
            raise ReplicaLost(f"its engine has made no step for {state.silent_s:.0f} s")
        phase = "ready" if entry.phase == "starting" else entry.phase
        if entry.phase == "starting":
            self._ready_s[replica_id] = self.clock.now_s()
            self.trouble = None
        self._entries[replica_id] = replace(entry, phase=phase, state=state)
        self._publish()
        if state.draining and phase != "draining":  # somebody before us began to drain it
            self._drain_later(replica_id, 0.0)

    async def _remove(self, replica_id: str) -> None:
        self._entries.pop(replica_id, None)
        self._ready_s.pop(replica_id, None)
        watcher = self._watchers.pop(replica_id, None)
        if watcher is not None:
            watcher.cancel()
        self._publish()
        await self._stop(replica_id)

    async def _stop(self, replica_id: str) -> None:
        try:
            async with asyncio.timeout(STOP_S):
                await self.launcher.stop(replica_id)
        except Exception as error:
            self.trouble = f"{replica_id} could not be stopped: {_sentence(error)}"

    def _served_s(self, replica_id: str) -> float:
        now_s = self.clock.now_s()
        return now_s - self._ready_s.get(replica_id, now_s)

    def _is_wanted(self, slot: Slot) -> bool:
        """Whether a replica is missed there: on a machine that is given up, none is."""
        return not slot.machine or slot.machine in self._machines.get(slot.role, ())

    def _count_failure(self, slot: Slot) -> None:
        """The first failure is made good at once; each further one in a row waits twice as long."""
        failures = self._failures[slot]
        self._failures[slot] += 1
        if failures:
            delay_s = min(FIRST_BACKOFF_S * 2 ** min(failures, 10), LONGEST_BACKOFF_S)
            self._start_at_s[slot] = self.clock.now_s() + delay_s

    def _wait_s(self, slot: Slot) -> float:
        """Until a replica may be started there again; 0 when it may now."""
        left_s = self._start_at_s.get(slot, -math.inf) - self.clock.now_s()
        return left_s if left_s > 1e-3 else 0.0  # a sum of floats may fall short by a hair

    async def _fill_in_time(self, slot: Slot) -> None:
        """Start what is missing once it was waited long enough after the failures there."""
        while (left_s := self._wait_s(slot)) > 0:
            await self.clock.sleep(left_s)
        await self._fill()

    async def _fill(self) -> None:
        """Start what is missing, but nothing where it has to wait (`_fill_in_time` will)."""
        for role in self.wanted:
            while (slot := self._missing(role)) is not None:
                await self._start(slot)

    def _missing(self, role: Role) -> Slot | None:
        """Where a replica of the role is to be started next; None where there is nothing to do."""
        if role not in self._machines:
            slot = Slot(role, "")
            short = self._serving(role) < self.wanted[role]
            return slot if short and not self._wait_s(slot) else None
        taken = {machine_of(replica_id) for replica_id in self._entries}
        slots = (Slot(role, name) for name in self._machines[role] if name not in taken)
        return next((slot for slot in slots if not self._wait_s(slot)), None)

    def _serving(self, role: Role) -> int:
        return sum(_counts(entry, role) for entry in self._entries.values())

    async def _start(self, slot: Slot) -> None:
        replica_id = self._new_id(slot)
        self._entries[replica_id] = Entry(replica_id, slot.role, "starting")
        try:
            await self.launcher.start(slot.role, replica_id)
        except Exception as error:
            self.trouble = f"{replica_id} could not be started: {_sentence(error)}"
            self._count_failure(slot)
            await self._remove(replica_id)
            self._later(self._fill_in_time(slot))
            return
        if replica_id in self._entries:
            self._watch(self._entries[replica_id])
        else:  # drained or stopped while it was being started
            await self._stop(replica_id)

    def _new_id(self, slot: Slot) -> str:
        """A name that no replica that we know of has."""
        names = (on_machine(f"{slot.role}-{n}", slot.machine) for n in self._numbers)
        return next(name for name in names if name not in self._entries)

    def _publish(self) -> None:
        self._version += 1
        self._published.set()
        self._published = asyncio.Event()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _counts(entry: Entry, role: Role) -> bool:
    """Whether an entry counts towards the replicas wanted of a role."""
    return entry.role == role and entry.phase != "draining"


def _slot(entry: Entry) -> Slot:
    return Slot(entry.role, machine_of(entry.replica_id))


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
