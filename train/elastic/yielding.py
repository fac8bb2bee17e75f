"""A training job before the allocator: what it holds and wants, what a machine less would cost it.

The price is measured: each time the set of workers has changed, how long nobody trained, times the
machines that stood, times what they cost. `Claim` has the fields that the autoscaler's loop reads
of a job (its `TrainingClaim`); its `Yield` is `give` here, its `Return` is `take`.
"""

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from train.elastic.messages import Finished, Plan
from train.elastic.supervisor import Journal, Supervisor

REMEMBERED = 8
"""Changes that the price is the median of: the newest ones, since steps and state change."""


@dataclass(frozen=True)
class Claim:
    """A training job. machines: that it holds. wanted: how many it could use; least: fewest it can
    run on. shrink_usd: what giving one up costs it. value_usd_per_h: what one more is worth."""

    job: str
    machines: tuple[str, ...]
    wanted: int
    least: int
    shrink_usd: float
    value_usd_per_h: float


class Change(NamedTuple):
    """The workers changed. stopped_s: from the last step before to the first one after, less what a
    step takes; work made twice is in it. before, after: workers."""

    generation: int
    before: int
    after: int
    stopped_s: float

    def usd(self, machine_usd_per_h: float) -> float:
        """What the machines cost that stood meanwhile."""
        return self.stopped_s * max(self.before, self.after) * machine_usd_per_h / 3600


def changes(journal: Sequence[Journal]) -> list[Change]:
    """Every change of workers that a step has followed, from a run's journal."""
    found = []
    last: Journal | None = None
    trained: Plan | None = None
    due: Plan | None = None
    for entry in journal:
        if isinstance(entry.what, Plan):
            due = entry.what
        elif isinstance(entry.what, Finished) and due and entry.what.generation == due.generation:
            if last and trained and trained is not due:
                stopped_s = max(entry.at_s - last.at_s - entry.what.step_s, 0.0)
                sizes = len(trained.ranks), len(due.ranks)
                found.append(Change(due.generation, *sizes, stopped_s))
            last, trained = entry, due
    return found


class Yielding:
    """One job's side of the protocol; any thread, any call as often as one likes.

    machine_usd_per_h: price of one machine. guess_s: how long a change stops the job, until one was
    measured.
    """

    def __init__(
        self,
        job: str,
        supervisor: Supervisor,
        *,
        wanted: int,
        machine_usd_per_h: float,
        value_usd_per_h: float,
        guess_s: float = 30.0,
    ) -> None:
        self._job, self._supervisor, self._wanted = job, supervisor, wanted
        self._machine_usd_per_h, self._value_usd_per_h = machine_usd_per_h, value_usd_per_h
        self._guess_s = guess_s
        self._lock = threading.Lock()
        self._meant = supervisor.members.machines  # after all that was asked of the supervisor

    def claim(self) -> Claim:
        """As it stands now. A machine is held until its worker's process is gone; a job that is
        over holds and wants none."""
        over = self._supervisor.over
        return Claim(
            job=self._job,
            machines=() if over else self._held(),
            wanted=0 if over else self._wanted,
            least=0 if over else self._supervisor.members.policy.least,
            shrink_usd=self.shrink_usd(),
            value_usd_per_h=self._value_usd_per_h,
        )

    def shrink_usd(self) -> float:
        """The median of what changes have cost lately, at today's number of machines."""
        measured = changes(list(self._supervisor.report.journal))[-REMEMBERED:]
        stopped_s = statistics.median(c.stopped_s for c in measured) if measured else self._guess_s
        return stopped_s * len(self._meant) * self._machine_usd_per_h / 3600

    def give(self, machine: str, notice_s: float) -> None:
        """The allocator takes a machine: its worker leaves after the step under way, or when
        notice_s is nearly over. ValueError if the job does not hold it or has none to spare."""
        with self._lock:
            rest = tuple(name for name in self._meant if name != machine)
            least = self._supervisor.members.policy.least
            if rest == self._meant:
                if machine in self._held():
                    return  # it is on its way out
                raise ValueError(f"{machine} is none of {self._job}'s machines {self._meant}")
            if len(rest) < least:
                raise ValueError(
                    f"{self._job} runs on {least} machines or more, so it keeps {machine}; it "
                    f"holds {self._meant}"
                )
            self._meant = rest
            self._supervisor.change_machines(rest, notice_s)

    def take(self, machine: str) -> None:
        """The allocator gives a machine: a worker starts there, and joins after the step under way.
        Nothing if the job holds it already, or is over."""
        with self._lock:
            if machine not in self._meant and not self._supervisor.over:
                self._meant = (*self._meant, machine)
                self._supervisor.change_machines(self._meant, 0.0)

    def _held(self) -> tuple[str, ...]:
        """What the job is meant to have, then what a worker has not left yet."""
        workers = list(self._supervisor.members.workers.values())
        return tuple(dict.fromkeys((*self._meant, *(w.machine for w in workers if w.machine))))
