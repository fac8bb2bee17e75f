"""Who trains: a state machine from what happens to workers to what is to be done. No I/O, no clock.

A generation is gathered (everybody idle), planned, runs, and ends: at once when a member is lost,
after the step under way when a change is wanted. The caller reports events, then does what `orders`
returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from train.elastic.messages import Fence, Finished, Held, Idle, Leave, Plan, ToWorker
from train.resilience.gemini import newest_whole


@dataclass(frozen=True)
class Policy:
    """target: workers that train; least: fewest that may. spares: further ones that stand by.
    start_s: how long the first generation waits for all of them. wait_s: how long survivors wait
    for a replacement that starts before they go on without it.
    hurry_s: a step still under way so long before a member's machine goes is abandoned, so that
    there is time to hand over. failed_starts: so many workers in a row that end before they are
    ready end the job. replaced: whether who is lost once training has begun is replaced, or the
    others go on with one fewer for good."""

    target: int
    least: int = 1
    spares: int = 0
    start_s: float = 60.0
    wait_s: float = 0.0
    hurry_s: float = 2.0
    failed_starts: int = 3
    replaced: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.target:
            raise ValueError(
                f"least = {self.least} workers of target = {self.target}: 1 to target are accepted"
            )


@dataclass(frozen=True)
class Launch:
    """Start a worker's process."""

    worker: str
    machine: str


@dataclass(frozen=True)
class Send:
    """Tell a worker."""

    worker: str
    message: ToWorker


Order = Launch | Send


class JobFailed(Exception):
    """The job cannot go on; the message says why."""


@dataclass
class Worker:
    """One worker as the supervisor knows it. doomed_s: when its machine goes, if told."""

    name: str
    machine: str
    state: Literal["starting", "idle", "running", "left"] = "starting"
    idle: Idle | None = None
    doomed_s: float | None = None


@dataclass
class Membership:
    """All workers and the generation they are in. `machines`: where workers may run, one each; ()
    for wherever the launcher starts them."""

    policy: Policy
    machines: tuple[str, ...] = ()
    generation: int = 0
    phase: Literal["gathering", "running", "pausing", "finished"] = "gathering"
    reached: int = 0
    plan: Plan | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    _launched: int = 0
    _failed_starts: int = 0
    _barren: int = 0
    _gathering_since_s: float | None = None

    # What happened.

    def idle(self, name: str, message: Idle) -> None:
        """A worker is in no group any more (or not yet)."""
        worker = self.workers[name]
        if worker.state == "starting":
            self._failed_starts = 0
        worker.state, worker.idle = "idle", message
        if message.last:
            self.finished(message.last)
        current = message.generation == self.generation
        if message.reason == "changed" and current and self.phase in ("running", "pausing"):
            self._barren += 1
            if self._barren > 5:
                raise JobFailed(f"the group breaks again and again: {message.detail}")
            self._break()

    def finished(self, step: Finished) -> None:
        """A step ended."""
        if step.step > self.reached:
            self.reached, self._barren = step.step, 0

    def lost(self, name: str, why: str = "") -> None:
        """A worker's process is gone; why, where that is known."""
        worker = self.workers.pop(name)
        if worker.state == "starting" and worker.doomed_s is None:
            self._failed_starts += 1
            if self._failed_starts >= self.policy.failed_starts:
                raise JobFailed(f"{self._failed_starts} workers ended while they started: {why}")
        if self.plan and not self.policy.replaced and worker.state in ("running", "idle"):
            self.resize(max(self.policy.target - 1, 1))
        if worker.state == "running" and self.phase in ("running", "pausing"):
            self._barren = 0
            self._break()

    def notice(self, name: str, deadline_s: float) -> None:
        """A worker's machine goes at deadline_s (by the clock of `orders`)."""
        self.workers[name].doomed_s = deadline_s

    def resize(self, target: int) -> None:
        """So many shall train from the next step boundary on."""
        self.policy = replace(self.policy, target=target, least=min(self.policy.least, target))

    def _break(self) -> None:
        self.phase = "gathering"
        self._fences = [name for name, w in self.workers.items() if w.state == "running"]

    _fences: list[str] = field(default_factory=list)

    # What to do.

    def orders(self, now_s: float) -> list[Order]:
        """Everything to be done now; call after each event and from time to time."""
        if self.phase == "finished":
            return self._dismiss(list(self.workers.values()))
        orders: list[Order] = list(self._staff())
        hard = Fence(generation=self.generation, hard=True)
        orders += [Send(name, hard) for name in self._fences if name in self.workers]
        self._fences = []
        if self.phase == "running" and self._change_due():
            self.phase = "pausing"
            soft = Fence(generation=self.generation, hard=False)
            orders += [Send(w.name, soft) for w in self._in("running")]
        if self.phase == "pausing" and self._hurried(now_s):
            self._break()
            return orders + self.orders(now_s)
        if self.phase in ("running", "pausing") and not self._in("running"):
            self.phase = "finished" if self._all_done() else "gathering"
            return orders + self.orders(now_s)
        if self.phase == "gathering" and not self._in("running"):
            orders += self._gathered(now_s)
        if self.phase == "running":
            orders += self._dismiss(self._surplus())
        return orders

    def _all_done(self) -> bool:
        members = [self.workers.get(name) for name in (self.plan.ranks if self.plan else ())]
        return all(w is not None and w.idle and w.idle.reason == "done" for w in members)

    def _hurried(self, now_s: float) -> bool:
        due = [w.doomed_s for w in self._in("running") if w.doomed_s is not None]
        return bool(due) and min(due) - now_s <= self.policy.hurry_s

    def _surplus(self) -> list[Worker]:
        """Idle workers that nobody waits for."""
        doomed = [worker for worker in self._in("idle") if worker.doomed_s is not None]
        wanted = self.policy.target + self.policy.spares - len(self._training())
        return doomed + self._fit()[max(wanted, 0) :]

    def _training(self) -> list[Worker]:
        """Members that train and stay."""
        ranks = self.plan.ranks if self.plan else ()
        return [w for w in self._in("running") if w.name in ranks and w.doomed_s is None]

    def _in(self, state: str) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.state == state]

    def _fit(self) -> list[Worker]:
        """Ready to train and not about to go."""
        return [worker for worker in self._in("idle") if worker.doomed_s is None]

    def _staff(self) -> list[Launch]:
        """Launches that are missing."""
        staying = [w for w in self.workers.values() if w.doomed_s is None and w.state != "left"]
        missing = self.policy.target + self.policy.spares - len(staying)
        taken = {worker.machine for worker in self.workers.values()}
        free = [machine for machine in self.machines if machine not in taken]
        places = free if self.machines else [""] * missing
        launches = []
        for machine in places[: max(missing, 0)]:
            name = f"w{self._launched}"
            self._launched += 1
            self.workers[name] = Worker(name, machine)
            launches.append(Launch(name, machine))
        return launches

    def _change_due(self) -> bool:
        ranks = self.plan.ranks if self.plan else ()
        doomed = any(w.doomed_s is not None for w in self._in("running") if w.name in ranks)
        staying = len(self._training())
        can_grow = staying < self.policy.target and bool(self._fit())
        return doomed or can_grow or staying > self.policy.target

    def _gathered(self, now_s: float) -> list[Order]:
        """Nobody trains: the next plan, if there are enough workers for one."""
        if self._gathering_since_s is None:
            self._gathering_since_s = now_s
        fit = self._fit()
        patience_s = self.policy.wait_s if self.plan else self.policy.start_s
        waited = now_s - self._gathering_since_s >= patience_s
        short = len(fit) < self.policy.target
        if len(fit) < self.policy.least or (short and self._in("starting") and not waited):
            return []
        self._gathering_since_s = None
        ranks = self._ranks([worker.name for worker in fit])
        return self._planned(ranks)

    def _ranks(self, fit: Sequence[str]) -> list[str]:
        """Survivors keep their ranks if the size stays, else their order; newcomers fill up."""
        size = min(len(fit), self.policy.target)
        old = [name if name in fit else "" for name in (self.plan.ranks if self.plan else ())]
        fresh = [name for name in fit if name not in old]
        if len(old) != size:
            old = [name for name in old if name][:size]
            old += [""] * (size - len(old))
        return [name or fresh.pop(0) for name in old]

    def _planned(self, ranks: list[str]) -> list[Order]:
        idle = {w.name: w.idle for w in self._in("idle") if w.idle}
        version, missing = newest_whole([message.held for message in idle.values()])
        givers = [] if version is None else self._givers(idle, ranks)
        everyone = ranks + givers
        self.generation += 1
        host, port = idle[ranks[0]].host, idle[ranks[0]].port
        holders = (
            ()
            if version is None
            else tuple(
                tuple(
                    place
                    for place, name in enumerate(everyone)
                    if Held(version=version, index=index) in idle[name].held
                )
                for index in range(version.shards)
            )
        )
        step = version.step if version else 0
        lost = missing if self.reached else ()
        if version and step < self.reached - 1:
            # One step back is a step that was under way: not everybody had ended it.
            lost = (f"steps {step + 1} to {self.reached}: nobody who is left holds them",)
        self.plan = Plan(
            generation=self.generation,
            ranks=tuple(ranks),
            givers=tuple(givers),
            host=host,
            port=port,
            version=version,
            holders=holders,
            lost=lost,
        )
        self.reached = step if version else self.reached
        self.phase = "running"
        for name in everyone:
            self.workers[name].state = "running"
        return [Send(name, self.plan) for name in everyone]

    def _givers(self, idle: dict[str, Idle], ranks: Sequence[str]) -> list[str]:
        """Idle workers that will not train but hold a share that none of `ranks` does."""
        version, _ = newest_whole([message.held for message in idle.values()])
        assert version is not None
        have = {h.index for name in ranks for h in idle[name].held if h.version == version}
        givers = []
        for name, message in idle.items():
            brings = {h.index for h in message.held if h.version == version} - have
            if name not in ranks and brings:
                givers.append(name)
                have |= brings
        return givers

    def _dismiss(self, workers: list[Worker]) -> list[Order]:
        """Leaves for idle workers, each told once."""
        told: list[Order] = []
        for worker in workers:
            if worker.state == "idle":
                worker.state = "left"
                told.append(Send(worker.name, Leave()))
        return told
