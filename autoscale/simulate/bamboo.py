"""Training on spot machines with redundant pipelines, as Bamboo does it, in virtual time.

Thorpe et al., "Bamboo: Making Preemptible Instances Resilient for Affordable Training of Large
DNNs", NSDI 23. Each machine of a pipeline also holds its successor's stage. A machine that goes is
stood in for by its predecessor, slower, until a reconfiguration; two neighbours at once are fatal
and all meet again. Rules, times and the order of random draws are those of the paper's published
simulator, so that its rows can be reproduced; machines come and go by chance or by a recorded
trace.
"""

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

HOUR_MS = 3_600_000
READY_MS = 45_000  # from a machine's coming until it can work
ALL_MEET_MS = 30_000
SOME_MEET_MS = 20_000
SLOWDOWN = 1.5  # of the step in which a machine is lost


class Kind(IntEnum):
    """What happens; of things at the same moment the smaller goes first."""

    ADD = 1
    REMOVE = 2
    DRAW = 3
    READY = 4
    ALL_MET = 5
    SOME_MET = 6
    STEP = 7


@dataclass(order=True)
class Event:
    """Something at a time; name of a machine, or the meeting that a step belongs to."""

    at_ms: int
    kind: Kind
    name: str = field(default="", compare=False)
    meeting: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Job:
    """What is trained: steps to do, samples in each, stages, and milliseconds of a step by the
    number of pipelines. capacity: machines asked for."""

    steps: int
    samples: int
    stages: int
    step_ms: dict[int, int]
    capacity: int
    usd_per_h: float


BERT = Job(22_194, 264, 12, {1: 4310, 2: 2390, 3: 1805, 4: 1450}, 48, 0.91)


@dataclass
class Machine:
    """since_ms: when it came. places: (pipeline, stage) that it computes; two while it stands
    in."""

    since_ms: int
    ready: bool = False
    running: bool = False
    places: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Means over the run: machines, samples per second, dollars per hour, and samples per dollar
    and 3,600 (as the paper divides them)."""

    preemptions: int
    fatal: int
    steps: int
    machines: float
    samples_per_s: float
    usd_per_h: float
    value: float
    hours: float


class Draws:
    """When machines come and go by chance: each hour, each machine goes with `removal`, each
    missing one comes with the hour's chance."""

    def __init__(self, removal: float, seed: int, capacity: int) -> None:
        self._random = random.Random(seed)
        self._coming = [self._random.random() for _ in range(24)]
        self._removal, self._capacity = removal, capacity
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"node{self._names}"

    def first(self) -> list[Event]:
        """Who is there at the start."""
        there = [self._coming[0] > self._random.random() for _ in range(self._capacity)]
        return [Event(0, Kind.ADD, self.name()) for came in there if came]

    def hour(self, now_ms: int, present: Iterable[str]) -> list[Event]:
        """What happens in the hour from now_ms on."""
        names = set(present)
        hour = now_ms // HOUR_MS % 24
        going = [(at, name) for name in present if (at := self._when(now_ms, self._removal))]
        heapq.heapify(going)
        missing = self._capacity - len(names) + len(going)
        coming = [at for _ in range(missing) if (at := self._when(now_ms, self._coming[hour]))]
        heapq.heapify(coming)
        events: list[Event] = []
        while going or coming:
            if going and (not coming or going[0][0] < coming[0]):
                at, name = heapq.heappop(going)
                events.append(Event(at, Kind.REMOVE, name))
                names.discard(name)
                continue
            at = heapq.heappop(coming)
            if len(names) == self._capacity:
                continue
            name = self.name()
            events.append(Event(at, Kind.ADD, name))
            names.add(name)
            gone = self._when(now_ms, self._removal)
            if gone and gone >= at:
                heapq.heappush(going, (gone, name))
        return events

    def _when(self, now_ms: int, chance: float) -> int:
        """A moment of the hour (of whole seconds), or 0 for not at all."""
        if chance > self._random.random():
            return now_ms + self._random.randrange(0, 3600) * 1000 or 1
        return 0


class Training:
    """The run. Give it draws or a trace, then `run`."""

    def __init__(self, job: Job, draws: Draws | None = None, trace: Iterable[Event] = ()) -> None:
        self.job, self._draws = job, draws
        self.machines: dict[str, Machine] = {}
        self._events: list[Event] = []
        for event in draws.first() if draws else trace:
            heapq.heappush(self._events, event)
        if draws:
            heapq.heappush(self._events, Event(0, Kind.DRAW))
        self.pipelines = self.waiting = self.meeting = self.steps = 0
        self.preemptions = self.fatal = 0
        self.state = "stopped"
        self._meeting_names: list[str] = []
        self._lost: tuple[int, int] | None = None  # (step, when) of the first loss since a meeting
        self._paid_for_loss = False
        self._step_ms = 0
        self._books = Books(job)

    def run(self, until_ms: int | None = None) -> Result:
        """To the last step, the end of a trace, or until_ms."""
        while self._events and (until_ms is not None or self.steps < self.job.steps):
            event = heapq.heappop(self._events)
            if until_ms is not None and event.at_ms > until_ms:
                break
            self._handle(event)
            if not self._events or self._events[0].at_ms != event.at_ms:
                self._books.held(event.at_ms, len(self.machines))
        return self._books.result(self.preemptions, self.fatal, self.steps)

    def _handle(self, event: Event) -> None:
        at, name = event.at_ms, event.name
        if event.kind == Kind.ADD:
            self.machines[name] = Machine(at)
            self._push(Event(at + READY_MS, Kind.READY, name))
        elif event.kind == Kind.REMOVE:
            self._remove(at, name)
        elif event.kind == Kind.DRAW:
            assert self._draws
            self._push(Event(at + HOUR_MS, Kind.DRAW))
            for drawn in self._draws.hour(at, self.machines):
                self._push(drawn)
        elif event.kind == Kind.READY and name in self.machines:
            self._ready(at, name)
        elif event.kind in (Kind.ALL_MET, Kind.SOME_MET):
            self._met(at, event.kind)
        elif event.kind == Kind.STEP and event.meeting == self.meeting:
            self._step(at)

    def _push(self, event: Event) -> None:
        heapq.heappush(self._events, event)

    def _ready(self, at: int, name: str) -> None:
        self.machines[name].ready = True
        if self.state == "stopped":
            self._meet(at, Kind.ALL_MET)
        elif self.state == "meeting":
            self._meeting_names.append(name)
        else:
            self.waiting += 1

    def _remove(self, at: int, name: str) -> None:
        machine = self.machines.pop(name)
        self.preemptions += 1
        if machine.running and not self._stand_in(machine):
            self.fatal += 1
            self._meet(at, Kind.ALL_MET)
            return
        if self.state == "running" and self._lost is None:
            self._lost, self._paid_for_loss = (self.steps, at), False
            self._step_ms = int(self._step_ms * SLOWDOWN)

    def _stand_in(self, lost: Machine) -> bool:
        """The predecessor takes the lost machine's place; False when that cannot be."""
        if len(lost.places) > 1:
            return False
        pipeline, stage = lost.places[0]
        before = (pipeline, (stage - 1) % self.job.stages)
        for machine in self.machines.values():
            if before in machine.places:
                if len(machine.places) > 1:
                    return False
                machine.places.append(lost.places[0])
                break
        return True

    def _meet(self, at: int, kind: Kind) -> None:
        self.state = "meeting"
        able = [name for name, m in self.machines.items() if m.ready or m.running]
        self._meeting_names = able
        self._push(Event(at + (ALL_MEET_MS if kind == Kind.ALL_MET else SOME_MEET_MS), kind))

    def _met(self, at: int, kind: Kind) -> None:
        if any(name not in self.machines for name in self._meeting_names):
            self._meet(at, kind)  # somebody went during the meeting
            return
        self._assign()
        self._lost, self._paid_for_loss = None, False
        self.meeting += 1
        self._meeting_names = []
        self.state = "running" if self.pipelines else "stopped"
        if self.pipelines:
            self._step_ms = self.job.step_ms[self.pipelines]
            self._push(Event(at + self._step_ms, Kind.STEP, meeting=self.meeting))
            self._books.start(at)

    def _assign(self) -> None:
        stages = self.job.stages
        self.pipelines = len(self._meeting_names) // stages
        places = [(p, s) for p in range(self.pipelines) for s in range(stages)]
        for place, name in enumerate(self._meeting_names):
            machine = self.machines[name]
            machine.running = place < len(places)
            machine.ready = not machine.running
            machine.places = [places[place]] if machine.running else []
        self.waiting = len(self._meeting_names) - len(places)

    def _step(self, at: int) -> None:
        if self._lost and not self._paid_for_loss and self._lost[0] == self.steps:
            late = int((at - self._lost[1]) * (SLOWDOWN - 1))
            self._push(Event(at + late, Kind.STEP, meeting=self.meeting))
            self._paid_for_loss = True
            return
        self.steps += 1
        self._books.step(at)
        if self._should_meet():
            self._meet(at, Kind.SOME_MET)
        else:
            self._push(Event(at + self._step_ms, Kind.STEP, meeting=self.meeting))

    def _should_meet(self) -> bool:
        """Enough wait to relieve who stands in, a second loss is likely to be fatal, or a further
        pipeline has its machines."""
        doubled = sum(m.running and len(m.places) > 1 for m in self.machines.values())
        active = self.pipelines * self.job.stages - doubled
        if doubled and (self.waiting >= doubled or 2 * doubled / active > 0.05):
            return True
        return (active + self.waiting) // self.job.stages > self.pipelines


class Books:
    """What was held, paid and done, summed as it happens."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._count: int | None = None
        self._since_ms = self._last_step_ms = 0
        self._held_ms = self._step_held_ms = (
            0.0  # machine-milliseconds in all, and at the last step
        )
        self._value_ms = 0.0
        self._start_ms: int | None = None
        self._end_held_ms = 0.0

    def held(self, at_ms: int, count: int) -> None:
        """So many machines from now on; before the first time passes, from the start on."""
        if self._count is None:
            if at_ms > 0:
                self._count, self._since_ms = count, 0
            return
        if count != self._count:
            self._held_ms += (at_ms - self._since_ms) * self._count
            self._count, self._since_ms = count, at_ms

    def start(self, at_ms: int) -> None:
        if self._start_ms is None:
            self._start_ms = self._last_step_ms = at_ms
            self._step_held_ms = self._upto(at_ms)

    def step(self, at_ms: int) -> None:
        held = self._upto(at_ms)
        paid = (held - self._step_held_ms) * self._job.usd_per_h  # dollar-milliseconds per hour
        took = at_ms - self._last_step_ms
        self._value_ms += self._job.samples / (took / 1000) / (paid / took) * took
        self._last_step_ms, self._step_held_ms = at_ms, held

    def _upto(self, at_ms: int) -> float:
        return self._held_ms + (at_ms - self._since_ms) * (self._count or 0)

    def result(self, preemptions: int, fatal: int, steps: int) -> Result:
        assert self._start_ms is not None, "no pipeline ever ran"
        ran_ms = self._last_step_ms - self._start_ms
        machines = self._step_held_ms / self._last_step_ms
        return Result(
            preemptions,
            fatal,
            steps,
            machines,
            steps * self._job.samples / (ran_ms / 1000),
            machines * self._job.usd_per_h,
            self._value_ms / ran_ms,
            self._last_step_ms / HOUR_MS,
        )


def read_trace(lines: Iterable[str]) -> list[Event]:
    """Rows of milliseconds, add or remove, machine. ValueError names the row that is none."""
    events = []
    for number, line in enumerate(lines, 1):
        cells = line.strip().split(",")
        if len(cells) != 3 or cells[1] not in ("add", "remove") or not cells[0].isdigit():
            raise ValueError(
                f"row {number} is {line.strip()!r}; wanted milliseconds,add|remove,name"
            )
        kind = Kind.ADD if cells[1] == "add" else Kind.REMOVE
        events.append(Event(int(cells[0]), kind, cells[2]))
    return events
