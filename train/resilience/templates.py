"""Pipeline templates (Oobleck, SOSP 23): for every number of workers a pipeline may have, the cut
of the layers that makes it fastest, and which of these pipelines a number of workers is divided
into.

Everything here is arithmetic on measured layer times; `train.resilience.oobleck` runs what it says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from train.parallel.pipeline_layout import Span


@dataclass(frozen=True)
class LayerCosts:
    """By layer: seconds forward and backward of one micro-batch, bytes of its state, seconds to
    send its output on and the gradient back; memory_bytes of a worker."""

    seconds: tuple[float, ...]
    state_bytes: tuple[float, ...]
    send_s: tuple[float, ...]
    memory_bytes: float = float("inf")


class Template(NamedTuple):
    """A pipeline of len(spans) workers. through_s: a micro-batch through all stages, sending
    included; slowest_s: of one in the slowest stage."""

    spans: tuple[Span, ...]
    through_s: float
    slowest_s: float

    def step_s(self, micros: int) -> float:
        """Seconds of a step of `micros` micro-batches: the first goes through, the others follow at
        the slowest stage's pace."""
        return self.through_s + (micros - 1) * self.slowest_s


class Cut(NamedTuple):
    """A partial cut of neighbouring layers, with what it costs."""

    through_s: float
    slowest_s: float
    spans: tuple[Span, ...]


class Cutter:
    """Divide and conquer over (first layer, end, workers), each range cut in two at every place and
    share of the workers; of every range the cuts are kept that none betters in both times, so the
    best for any number of micro-batches is among them."""

    def __init__(self, costs: LayerCosts) -> None:
        self.costs = costs
        self._known: dict[tuple[int, int, int], list[Cut]] = {}

    def template(self, workers: int, micros: int) -> Template | None:
        """The fastest pipeline of so many workers; None where the layers do not fit."""
        cuts = self._cuts(0, len(self.costs.seconds), workers)
        if not cuts:
            return None
        best = min(cuts, key=lambda c: (c.through_s + (micros - 1) * c.slowest_s, c.spans))
        return Template(best.spans, best.through_s, best.slowest_s)

    def _cuts(self, start: int, stop: int, workers: int) -> list[Cut]:
        if workers > stop - start:
            return []
        key = (start, stop, workers)
        if key not in self._known:
            self._known[key] = self._stage(start, stop) if workers == 1 else self._halves(*key)
        return self._known[key]

    def _stage(self, start: int, stop: int) -> list[Cut]:
        if sum(self.costs.state_bytes[start:stop]) > self.costs.memory_bytes:
            return []
        seconds = sum(self.costs.seconds[start:stop])
        return [Cut(seconds, seconds, (Span(start, stop),))]

    def _halves(self, start: int, stop: int, workers: int) -> list[Cut]:
        found: list[Cut] = []
        left_workers = workers // 2
        for middle in range(start + 1, stop):
            sending = self.costs.send_s[middle - 1]
            for left in self._cuts(start, middle, left_workers):
                for right in self._cuts(middle, stop, workers - left_workers):
                    through = left.through_s + sending + right.through_s
                    slowest = max(left.slowest_s, right.slowest_s)
                    _keep(found, Cut(through, slowest, left.spans + right.spans))
        return found


def _keep(cuts: list[Cut], new: Cut) -> None:
    """Adds a cut unless another is at least as good in both times; drops those it betters."""
    if any(c.through_s <= new.through_s and c.slowest_s <= new.slowest_s for c in cuts):
        return
    cuts[:] = [
        c for c in cuts if not (new.through_s <= c.through_s and new.slowest_s <= c.slowest_s)
    ]
    cuts.append(new)


class Plan(NamedTuple):
    """Pipelines side by side, larger ones first, with their micro-batches of a step; step_s: of the
    slowest. spares: workers that no pipeline has a use for."""

    templates: tuple[Template, ...]
    micros: tuple[int, ...]
    step_s: float
    spares: int


@dataclass(frozen=True)
class Planner:
    """Oobleck's planner. micros: micro-batches of a step, over all pipelines; failures: f, losses
    at once that any plan must survive, so at least f + 1 pipelines; least_workers: of a pipeline,
    where memory_bytes does not say it."""

    costs: LayerCosts
    micros: int
    failures: int = 1
    least_workers: int = 1

    @cached_property
    def templates(self) -> dict[int, Template]:
        """By number of workers, from the fewest that hold the model to one for each layer. The cut
        is for an even share of the micro-batches over f + 1 pipelines."""
        cutter = Cutter(self.costs)
        share = max(1, self.micros // (self.failures + 1))
        sizes = range(self.least_workers, len(self.costs.seconds) + 1)
        made = {n: cutter.template(n, share) for n in sizes}
        return {n: template for n, template in made.items() if template is not None}

    @property
    def fewest(self) -> int:
        """n0: workers that one pipeline needs. ValueError where no number holds the model."""
        if not self.templates:
            raise ValueError(
                f"memory_bytes = {self.costs.memory_bytes:g}: the largest layer alone has "
                f"{max(self.costs.state_bytes):g} bytes of state"
            )
        return min(self.templates)

    def plan(self, workers: int) -> Plan:
        """The fastest pipelines for so many workers, all of them in use where sizes allow.
        ValueError for fewer than (f + 1) n0."""
        least = (self.failures + 1) * self.fewest
        if workers < least:
            raise ValueError(
                f"{workers} workers: surviving {self.failures} losses takes at least "
                f"{self.failures + 1} pipelines of {self.fewest} workers, {least} in all"
            )
        for used in range(workers, 0, -1):
            covers = self.covers(used)
            if covers:
                plans = (self.of_sizes(sizes, workers - used) for sizes in covers)
                return min(plans, key=lambda plan: (plan.step_s, [len(t.spans) for t in plan[0]]))
        raise AssertionError("(f + 1) n0 workers always make f + 1 pipelines")

    def covers(self, workers: int) -> list[tuple[int, ...]]:
        """Every way to divide exactly so many workers into f + 1 or more pipelines, sizes falling;
        no more pipelines than micro-batches."""
        sizes = sorted(self.templates, reverse=True)
        found = (c for c in _sums(workers, sizes) if self.failures < len(c) <= self.micros)
        return list(found)

    def of_sizes(self, sizes: Sequence[int], spares: int = 0) -> Plan:
        """Pipelines of given sizes, the step's micro-batches shared so that the slowest is as fast
        as it can be."""
        templates = tuple(self.templates[n] for n in sizes)
        micros = share_micros(templates, self.micros)
        slowest = max(t.step_s(m) for t, m in zip(templates, micros, strict=True))
        return Plan(templates, micros, slowest, spares)


def share_micros(templates: Sequence[Template], micros: int) -> tuple[int, ...]:
    """Micro-batches for each pipeline, one at least: each next one goes where it is done first,
    which no other sharing betters in the slowest pipeline's time."""
    if micros < len(templates):
        raise ValueError(f"{micros} micro-batches are too few for {len(templates)} pipelines")
    shares = [1] * len(templates)
    for _ in range(micros - len(templates)):
        n = min(range(len(templates)), key=lambda n: (templates[n].step_s(shares[n] + 1), n))
        shares[n] += 1
    return tuple(shares)


def _sums(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every multiset of `sizes` (falling) with this sum, each falling."""
    if total == 0:
        yield ()
    for n, size in enumerate(sizes):
        if size <= total:
            for rest in _sums(total - size, sizes[n:]):
                yield (size, *rest)


def regroup(pipelines: Sequence[Sequence[int]], fewest: int, failures: int) -> list[list[int]]:
    """Pipelines after losses (lists of the ranks that are left) in which each has the fewest
    workers it needs again: one that is short borrows from the largest that can spare, else it joins
    another one. ValueError where fewer than f + 1 pipelines remain."""
    groups = [list(ranks) for ranks in pipelines if ranks]
    while any(len(group) < fewest for group in groups):
        short = min(groups, key=len)
        others = [group for group in groups if group is not short]
        largest = max(others, key=len, default=None)
        if largest is None:
            break
        if len(largest) > fewest:
            short.append(largest.pop())
        else:
            groups.remove(short)
            min(others, key=len).extend(short)
    if len(groups) <= failures or any(len(group) < fewest for group in groups):
        raise ValueError(
            f"{sum(map(len, groups))} workers are left: {failures + 1} pipelines of {fewest} "
            f"workers take {(failures + 1) * fewest}"
        )
    return sorted(groups, key=len, reverse=True)
