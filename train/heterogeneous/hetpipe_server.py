"""A parameter server of HetPipe (Park et al., ATC 2020): a stretch of the model's flat weights,
which changes one whole clock at a time.

A virtual worker's clock is the number of waves that it has pushed. A clock is whole once every
virtual worker has pushed its wave; the sum then makes the next version, so version v holds all
waves before v and nothing of later ones. Who has pushed c waves may read version v only if c - v is
at most the bound D, and waits until it may. With D = 0 that is bulk-synchronous training.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.job import OptimizerTable
from train.optimizer import Decay, adamw_update

FACTS = 3
"""Numbers that come with a wave: summed loss, samples a second, votes to stop."""
PATIENCE_S = 300.0
"""How long a reader waits for the others before it takes them for lost."""


class Stretch(NamedTuple):
    """Elements start to stop - 1 of the model's flat order."""

    start: int
    stop: int


class Read(NamedTuple):
    """What a virtual worker that had pushed `clock` waves was given."""

    worker: int
    clock: int
    version: int

    @property
    def staleness(self) -> int:
        """Waves of its own that the version did not hold yet: how far it was ahead."""
        return self.clock - self.version


class Pulled(NamedTuple):
    """version: waves of each worker that the weights hold; facts: (workers, FACTS) of the wave that
    lies bound + 1 before the reader's clock, None where that was before the beginning."""

    version: int
    facts: Tensor | None
    weights: Tensor


class Rule:
    """The job's update of a stretch of masters. decayed: stretches of it that weight decay applies
    to; rate: the learning rate after so many finished updates."""

    def __init__(
        self,
        masters: Tensor,
        decayed: Sequence[Stretch],
        table: OptimizerTable,
        rate: Callable[[int], float],
    ) -> None:
        """ValueError for an optimizer that does not work element by element."""
        if table.name not in ("adamw", "sgd"):
            raise ValueError(
                f'optimizer.name = "{table.name}" sees whole matrices, which servers share: '
                '"adamw" or "sgd" is accepted'
            )
        self.masters, self.rate, self._table = masters, rate, table
        self._parts = list(_parts(decayed, masters.numel(), table.weight_decay))
        kinds = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("exp_avg",) if table.beta1 else ()}
        self.moments = {kind: torch.zeros_like(masters) for kind in kinds[table.name]}

    def update(self, gradient: Tensor, finished: int) -> None:
        """One update of all of the stretch, after so many finished ones."""
        table, rate = self._table, self.rate(finished)
        if table.name == "sgd":
            momentum = self.moments.get("exp_avg")
            change = gradient if momentum is None else momentum.mul_(table.beta1).add_(gradient)
            for part, decay in self._parts:
                self.masters[part].mul_(1 - rate * decay)
            self.masters.add_(change, alpha=-rate)
            return
        first, second = self.moments["exp_avg"], self.moments["exp_avg_sq"]
        for part, decay in self._parts:
            adamw_update(
                self.masters[part],
                gradient[part],
                (first[part], second[part]),
                step=finished + 1,
                learning_rate=rate,
                decay=Decay(table.beta1, table.beta2, table.epsilon, decay),
            )


def _parts(decayed: Sequence[Stretch], count: int, decay: float) -> list[tuple[slice, float]]:
    """All of a stretch in slices, each with its weight decay."""
    found, at = [], 0
    for start, stop in decayed:
        if start > at:
            found.append((slice(at, start), 0.0))
        found.append((slice(start, stop), decay))
        at = stop
    return found + ([(slice(at, count), 0.0)] if at < count else [])


@dataclass(frozen=True)
class _Push:
    worker: int
    at: int
    gradient: Tensor


class Shard:
    """One server's stretch. workers: virtual workers, each of which pushes all of the stretch every
    clock, in one part or in several (stages of a pipeline have a part each). Called from many
    threads. reads: everything that was read under the bound, in the server's order."""

    def __init__(self, rule: Rule, workers: int, bound: int) -> None:
        self.rule, self.workers, self.bound = rule, workers, bound
        self.version = 0
        self.reads: list[Read] = []
        self._changed = threading.Condition()
        self._pushed: dict[int, list[_Push]] = {}
        self._facts: dict[int, Tensor] = {}

    def load(self, version: int) -> None:
        """Goes on with masters and moments that were written into the rule's tensors."""
        with self._changed:
            assert not self._pushed, "nobody has begun yet"
            self.version = version
            self._changed.notify_all()

    def push(self, worker: int, clock: int, at: int, gradient: Tensor, facts: Tensor) -> None:
        """A worker's summed gradient of its wave number `clock` (from 0), from element `at` of the
        stretch on. The tensor is kept until the clock is whole."""
        with self._changed:
            self._pushed.setdefault(clock, []).append(_Push(worker, at, gradient))
            known = self._facts.setdefault(clock, torch.zeros(self.workers, FACTS).double())
            known[worker] += facts
            while self._is_whole():
                self._finish()
            self._changed.notify_all()

    def pull(self, worker: int, clock: int, at: int, count: int, *, exact: bool) -> Pulled:
        """Elements at..at + count - 1 for a worker that has pushed `clock` waves. exact: of version
        `clock` itself, which every worker has to ask for. WorldChanged's cause, TimeoutError, when
        the others do not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.may_read(clock, exact), PATIENCE_S):
                raise TimeoutError(f"version {self.version} for clock {clock}: others are gone")
            if not exact:
                self.reads.append(Read(worker, clock, self.version))
            facts = self._facts.get(clock - self.bound - 1)
            weights = self.rule.masters[at : at + count].clone()
            return Pulled(self.version, None if facts is None else facts.clone(), weights)

    def may_read(self, clock: int, exact: bool) -> bool:
        """Whether who has pushed `clock` waves may go on with what is there."""
        return self.version >= (clock if exact else clock - self.bound)

    def _is_whole(self) -> bool:
        pushed = sum(push.gradient.numel() for push in self._pushed.get(self.version, []))
        return pushed == self.workers * self.rule.masters.numel() and pushed > 0

    def _finish(self) -> None:
        """Sums in the order of workers, whoever came first, so that D = 0 has the same bits."""
        total = torch.zeros_like(self.rule.masters)
        for push in sorted(self._pushed.pop(self.version), key=lambda p: (p.worker, p.at)):
            total[push.at : push.at + push.gradient.numel()] += push.gradient
        self.rule.update(total, self.version)
        self.version += 1
        self._facts.pop(self.version - self.bound - 2, None)  # everybody is past that
