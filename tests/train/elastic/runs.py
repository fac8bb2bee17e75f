"""Runs of the tiny job under a supervisor, with kills, and what they have to be like afterwards."""

import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.train.elastic.tiny import BATCH, Tiny, build, logged
from train.elastic.membership import Policy
from train.elastic.messages import Finished, Hello, Plan
from train.elastic.process import ProcessLauncher
from train.elastic.supervisor import Journal, Report, Supervisor

PRELOAD = ("train.elastic.worker", "tests.train.elastic.tiny")
DEADLINE_S = 240.0


def supervise(
    job: Tiny,
    policy: Policy,
    watch: Callable[[Supervisor, Journal], None] = lambda supervisor, entry: None,
    *,
    machines: tuple[str, ...] = (),
    silence_s: float = 30.0,
) -> Report:
    """A whole run in processes of its own."""
    launcher = ProcessLauncher(partial(build, job), preload=PRELOAD)
    supervisor = Supervisor(policy, launcher, machines=machines, silence_s=silence_s)
    supervisor.on_event = partial(watch, supervisor)
    return supervisor.run(DEADLINE_S)


@dataclass
class Killer:
    """Kills workers with -9 at seeded moments: after a seeded step, within the next one.

    Each waits until the group runs again, the world is `full` strong, and, where `spared`, another
    spare has started.
    """

    seed: int
    kills: int
    steps: int
    step_s: float
    full: int
    spared: bool = False
    pids: dict[str, int] = field(default_factory=dict)
    killed: list[tuple[str, float]] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    _plan: Plan | None = None

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        gap = (self.steps - 4) // self.kills
        self._due = [2 + n * gap + self._chance.randrange(gap // 2) for n in range(self.kills)]

    def __call__(self, supervisor: Supervisor, entry: Journal) -> None:
        if isinstance(entry.what, Hello):
            self.pids[entry.worker] = entry.what.pid
        elif isinstance(entry.what, Plan):
            self._plan = entry.what
        elif isinstance(entry.what, Finished):
            self._step(supervisor, entry, entry.what)

    def _step(self, supervisor: Supervisor, entry: Journal, step: Finished) -> None:
        assert self._plan
        if len(self.resumed_s) < len(self.killed) and step.generation > self._generation:
            self.resumed_s.append(entry.at_s - self.killed[-1][1])
        waiting = len(self.killed) > len(self.resumed_s)
        done = len(self.killed) >= self.kills
        bare = self.spared and all(w.state != "idle" for w in supervisor.members.workers.values())
        if waiting or done or bare or len(self._plan.ranks) < self.full:
            return
        if step.step >= self._due[len(self.killed)]:
            victim = self._chance.choice(self._plan.ranks)
            self._generation = step.generation
            delay_s = self._chance.random() * self.step_s
            self.killed.append((victim, entry.at_s + delay_s))
            threading.Timer(delay_s, os.kill, (self.pids[victim], signal.SIGKILL)).start()

    _generation: int = 0


def effective_ids(folder: Path) -> dict[int, list[int]]:
    """By step: the samples of the attempt that counts. A step is tried again only if nobody who
    lives on had finished it, so that is the last one."""
    tries: dict[int, dict[int, list[int]]] = {}
    for lines in logged(folder).values():
        for line in lines:
            if isinstance(tried := line.get("try"), list):
                by_generation = tries.setdefault(tried[0], {})
                by_generation.setdefault(int(str(line["generation"])), []).extend(tried[1:])
    return {step: found[max(found)] for step, found in tries.items()}


def seen(folder: Path) -> list[list[int]]:
    """How often each sample was part of an update, as each worker's last state has it."""
    lines = [line for worker in logged(folder).values() for line in worker if "seen" in line]
    newest = max(int(str(line["generation"])) for line in lines)
    return [
        line["seen"]
        for line in lines
        if line["generation"] == newest and isinstance(line["seen"], list)
    ]


def hellos(report: Report) -> dict[str, int]:
    """Every process that ever was a worker."""
    return {e.worker: e.what.pid for e in report.journal if isinstance(e.what, Hello)}


def refuse_other_processes(report: Report, folder: Path, processes: int) -> None:
    """Each worker was one process from its start to its end, and there were no more than so many:
    survivors keep theirs."""
    started = [entry.worker for entry in report.journal if isinstance(entry.what, Hello)]
    assert len(started) == len(set(started)) <= processes
    pids = hellos(report)
    for worker, lines in logged(folder).items():
        assert {line["pid"] for line in lines} == {pids[worker]}


def refuse_other_samples(folder: Path, steps: int, whole: bool) -> None:
    """Every sample was computed in its step, once, and is in the last state once."""
    ids = effective_ids(folder)
    assert {step: sorted(found) for step, found in ids.items()} == {
        step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, steps + 1)
    }
    counts = seen(folder)
    if not whole:
        counts = [[count for share in counts for count in share]]
    assert counts and all(found == [1] * (steps * BATCH) for found in counts)
