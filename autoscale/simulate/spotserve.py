"""Serving one big model on spot machines: two ways to go on when machines come and go.

*Rerouting* keeps the shape of its pipelines and changes only their number: a pipeline that loses a
machine is gone, its requests begin again elsewhere, and a new one reads its weights from storage
first. *Migrating* (SpotServe, ASPLOS 24, as ours do it) uses the notice: it moves to the best
configuration for the machines that will be there, with weights and caches from the machines that
have them, and its requests go on at the token where they were. Virtual time; batches start together
and end together.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from autoscale.simulate.plans import Config, LayerTimes, best_config

STAY = 1.1  # a shape of pipelines is kept while its latency is at most so many times the best
Way = Literal["rerouting", "migrating"]


class Change(NamedTuple):
    """At at_s so many machines have come (or gone, with a notice before)."""

    at_s: float
    came: tuple[str, ...]
    went: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Machines of `accelerators` each, how long ahead a loss is told, how fast weights come from
    storage and from a peer (bytes per second of one machine), and seconds to take up a new
    configuration with everything in place. planned: machines that rerouting chooses the shape of
    its pipelines for, which it then keeps (0: those of the beginning)."""

    accelerators: int = 4
    planned: int = 0
    notice_s: float = 30.0
    storage_bytes_per_s: float = 1e9
    peer_bytes_per_s: float = 6.25e9
    switch_s: float = 1.0


@dataclass(order=True)
class Work:
    """A request; tokens_left and whether its prompt is in a cache change as it is served."""

    arrival_s: float
    number: int
    tokens_left: float = field(compare=False)
    started: bool = field(default=False, compare=False)


@dataclass
class Pipeline:
    """A copy of the model on some machines, and the batch that it computes."""

    machines: tuple[str, ...]
    config: Config
    free_s: float
    batch: list[Work] = field(default_factory=list)
    begun_s: float = 0.0
    number: int = 0  # of the batch, so that an outdated end is known


class Serving:
    """The simulation. `latencies_s` fills as requests end."""

    def __init__(
        self, way: Way, times: LayerTimes, site: Site, requests_per_s: float, tokens: int
    ) -> None:
        self.way, self.times, self.site = way, times, site
        self.requests_per_s, self.tokens = requests_per_s, tokens
        self.latencies_s: list[float] = []
        self.recomputed_tokens = 0.0
        self.machine_s = 0.0
        self.machines: list[str] = []
        self.pipelines: list[Pipeline] = []
        self.queue: list[Work] = []
        self._ends: list[tuple[float, int, int]] = []  # time, pipeline by id, number of its batch
        self._shape: Config | None = None

    def run(self, arrivals_s: Sequence[float], changes: Iterable[Change], end_s: float) -> None:
        """Requests that arrive before end_s; machines stay as they are after it, until all
        ended."""
        waiting = deque(Work(at, n, self.tokens) for n, at in enumerate(arrivals_s) if at < end_s)
        events = _events(changes, self.site.notice_s if self.way == "migrating" else 0.0)
        paid_until_s = 0.0
        while waiting or events or self._ends or self.queue:
            nexts = [waiting[0].arrival_s if waiting else None, events[0][0] if events else None]
            nexts.append(self._ends[0][0] if self._ends else None)
            known = [at for at in nexts if at is not None]
            assert known, "requests wait and no machine will come"
            now_s = min(known)
            self.machine_s += max(0.0, min(now_s, end_s) - paid_until_s) * len(self.machines)
            paid_until_s = max(paid_until_s, min(now_s, end_s))
            while self._ends and self._ends[0][0] <= now_s:
                self._end(*heapq.heappop(self._ends))
            while waiting and waiting[0].arrival_s <= now_s:
                heapq.heappush(self.queue, waiting.popleft())
            while events and events[0][0] <= now_s:
                _, kind, change = heapq.heappop(events)
                self._change(now_s, kind, change)
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        """Give waiting requests to pipelines that are free."""
        for place, pipeline in enumerate(self.pipelines):
            if pipeline.batch or not self.queue:
                continue
            if pipeline.free_s > now_s:
                heapq.heappush(self._ends, (pipeline.free_s, place, -1))
                continue
            count = min(len(self.queue), pipeline.config.batch)
            count = 1 << (count.bit_length() - 1)  # measured batches are powers of two
            batch = [heapq.heappop(self.queue) for _ in range(count)]
            self._begin(now_s, place, batch)

    def _begin(self, now_s: float, place: int, batch: list[Work]) -> None:
        pipeline = self.pipelines[place]
        pipeline.batch, pipeline.begun_s = batch, now_s
        pipeline.number += 1
        heapq.heappush(self._ends, (now_s + self._takes(pipeline), place, pipeline.number))

    def _takes(self, pipeline: Pipeline) -> float:
        size = len(pipeline.batch)
        size = 1 << (size - 1).bit_length()
        tokens = max(work.tokens_left for work in pipeline.batch)
        first = 0.0
        if not all(work.started for work in pipeline.batch):
            first = self.times.first_s(pipeline.config, size)
        return first + tokens * self.times.next_s(pipeline.config, size)

    def _end(self, at_s: float, place: int, number: int) -> None:
        if place >= len(self.pipelines) or number != self.pipelines[place].number:
            return
        pipeline = self.pipelines[place]
        self.latencies_s += [at_s - work.arrival_s for work in pipeline.batch]
        pipeline.batch = []

    def _change(self, now_s: float, kind: str, change: Change) -> None:
        if kind == "leave":  # the end of a notice: paid until here
            self.machines = [name for name in self.machines if name not in change.went]
            if self.way == "migrating":
                return
        came = list(change.came) if kind == "come" else []
        self.machines += came
        staying = [name for name in self.machines if name not in change.went]
        if self.way == "rerouting":
            self._reroute(now_s, staying)
        else:
            self._migrate(now_s, staying, change.went, fresh=not self.pipelines)

    def _reroute(self, now_s: float, staying: list[str]) -> None:
        if self._shape is None:
            count = (self.site.planned or len(staying)) * self.site.accelerators
            self._shape = best_config(self.times, count, self.requests_per_s, self.tokens)
            if self._shape is None:
                raise ValueError(f"{count} accelerators do not hold the weights")
        kept = []
        for pipeline in self.pipelines:
            if set(pipeline.machines) <= set(staying):
                kept.append(pipeline)
                continue
            for work in pipeline.batch:
                self.recomputed_tokens += self._made(pipeline, now_s)
                heapq.heappush(self.queue, work)
        first = not self.pipelines and not kept
        loading_s = 0.0 if first else self._load_s(self._shape)
        new = self._placed(staying, kept, self._shape, now_s + loading_s)
        self._replace(now_s, kept + new)

    def _load_s(self, config: Config) -> float:
        """Each machine reads its share of the weights from storage."""
        machines = max(1, config.accelerators // self.site.accelerators)
        return self.times.weight_bytes / machines / self.site.storage_bytes_per_s

    def _migrate(self, now_s: float, staying: list[str], going: Sequence[str], fresh: bool) -> None:
        count = len(staying) * self.site.accelerators
        config = self._reshaped(count)
        same = self._shape is not None and self._shape[1:3] == config[1:3]
        self._shape = config
        kept = [p for p in self.pipelines if same and set(p.machines) <= set(staying)]
        stopped = [p for p in self.pipelines if p not in kept]
        # Weights flow while the old pipelines compute; only caches and the switch itself stop them.
        share = self.times.weight_bytes / max(1, config.accelerators // self.site.accelerators)
        ahead_s = 0.0 if fresh else share / self.site.peer_bytes_per_s
        pause_s = 0.0 if fresh else self.site.switch_s
        at_s = now_s + ahead_s
        moved: list[list[Work]] = []
        for pipeline in stopped:
            self._advance(pipeline, at_s)
            if pipeline.batch:
                moved.append(pipeline.batch)
        new = self._placed(staying, kept, config, at_s + pause_s)
        self._replace(now_s, kept + new)
        free = [place for place, p in enumerate(self.pipelines) if p in new]
        for batch in moved:
            if free and len(batch) <= config.batch:
                place = free.pop(0)
                self._begin(self.pipelines[place].free_s, place, batch)
            else:
                for work in batch:
                    heapq.heappush(self.queue, work)

    def _reshaped(self, count: int) -> Config:
        """The best configuration; but the present shape of pipelines stays where that keeps up with
        the arrivals and is not much slower, for a new one stops everybody."""
        best = best_config(self.times, count, self.requests_per_s, self.tokens)
        if best is None:
            raise ValueError(f"{count} accelerators do not hold the weights")
        if self._shape is None:
            return best
        now = best_config(
            self.times, count, self.requests_per_s, self.tokens, shape=self._shape[1:3]
        )
        if now is None:
            return best
        best_s, now_s = (self.times.latency_s(c, c.batch, self.tokens) for c in (best, now))
        keeps_up = now.copies * now.batch / now_s >= self.requests_per_s
        return now if keeps_up and now_s <= STAY * best_s else best

    def _made(self, pipeline: Pipeline, at_s: float) -> float:
        """Tokens of each request of its batch that it has made by at_s."""
        if not pipeline.batch or at_s <= pipeline.begun_s:
            return 0.0
        size = 1 << (len(pipeline.batch) - 1).bit_length()
        first = 0.0
        if not all(work.started for work in pipeline.batch):
            first = self.times.first_s(pipeline.config, size)
        spent_s = at_s - pipeline.begun_s - first
        return max(0.0, spent_s // self.times.next_s(pipeline.config, size))

    def _advance(self, pipeline: Pipeline, at_s: float) -> None:
        """What its batch has come to by at_s; requests that end until then end."""
        made = self._made(pipeline, at_s)
        ends_s = pipeline.begun_s + self._takes(pipeline) if pipeline.batch else at_s
        if pipeline.batch and ends_s <= at_s:
            self.latencies_s += [ends_s - work.arrival_s for work in pipeline.batch]
            pipeline.batch = []
        for work in pipeline.batch:
            if made > 0:
                work.started = True
                work.tokens_left = max(1.0, work.tokens_left - made)

    def _placed(
        self, staying: list[str], kept: list[Pipeline], config: Config, free_s: float
    ) -> list[Pipeline]:
        """Further pipelines on the machines that no kept one uses. A pipeline of less than a
        machine shares it; none spans parts of machines."""
        used = {name for pipeline in kept for name in pipeline.machines}
        idle = [name for name in staying if name not in used]
        size = config.accelerators
        if size >= self.site.accelerators:
            each = -(-size // self.site.accelerators)
            groups = [tuple(idle[at : at + each]) for at in range(0, len(idle) - each + 1, each)]
        else:
            groups = [(name,) for name in idle for _ in range(self.site.accelerators // size)]
        return [Pipeline(group, config, free_s) for group in groups]

    def _replace(self, now_s: float, pipelines: list[Pipeline]) -> None:
        """New places for all pipelines, and the ends of running batches under them."""
        running = [p for p in pipelines if p.batch]
        self.pipelines = pipelines
        self._ends = []
        for place, pipeline in enumerate(pipelines):
            if pipeline in running:
                end_s = max(now_s, pipeline.begun_s + self._takes(pipeline))
                heapq.heappush(self._ends, (end_s, place, pipeline.number))


def _events(changes: Iterable[Change], notice_s: float) -> list[tuple[float, str, Change]]:
    """Comings, notices (where they are used) and leavings, in a heap."""
    events: list[tuple[float, str, Change]] = []
    for change in changes:
        if change.came:
            heapq.heappush(events, (change.at_s, "come", change._replace(went=())))
        if change.went:
            gone = change._replace(came=())
            if notice_s:
                heapq.heappush(events, (max(0.0, change.at_s - notice_s), "told", gone))
            heapq.heappush(events, (change.at_s, "leave", gone))
    return events
