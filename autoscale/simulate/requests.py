"""Requests over a changing set of replicas, one by one, with memory that does not grow with their
number.

A replica serves `slots` requests at once, each for as long as its tokens take. Waiting is first
come, first served. What a lost machine was serving begins again, or goes on where it was if the
notice was enough to move it. Latencies are kept as counts over logarithmic cells of 2 %.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from autoscale.spot.fleet import Node


class Request(NamedTuple):
    """arrival_s, tokens in and out; done_tokens: of the output, what is there already; first_s:
    when the first of it was, None before."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    done_tokens: float = 0.0
    first_s: float | None = None

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class ReplicaSpeed:
    """How one replica serves: requests at once, prompt tokens per second, seconds between tokens.
    hand_over_s: what moving a running request costs; None: it cannot be moved and begins again."""

    slots: int
    prompt_tokens_per_s: float
    token_s: float
    hand_over_s: float | None = None

    def takes_s(self, request: Request) -> float:
        """Seconds in a slot. A request with tokens already made is one that was moved."""
        left = (request.output_tokens - request.done_tokens) * self.token_s
        if request.done_tokens and self.hand_over_s is not None:
            return self.hand_over_s + left
        return request.input_tokens / self.prompt_tokens_per_s + left


CELL = math.log(1.02)
FIRST_S = 1e-3


@dataclass
class Quantiles:
    """Counts of durations in cells of 2 %, from a millisecond on."""

    counts: dict[int, int] = field(default_factory=dict)
    total: int = 0

    def add(self, duration_s: float) -> None:
        cell = int(math.log(duration_s / FIRST_S) / CELL) if duration_s > FIRST_S else 0
        self.counts[cell] = self.counts.get(cell, 0) + 1
        self.total += 1

    def at(self, share: float) -> float:
        """The duration that `share` of them do not exceed, to 2 %; NaN of none."""
        seen = 0
        for cell in sorted(self.counts):
            seen += self.counts[cell]
            if seen >= share * self.total:
                return FIRST_S * math.exp((cell + 1) * CELL)
        return math.nan


class _Running(NamedTuple):
    end_s: float
    start_s: float
    first_s: float
    request: Request


class RequestLoad:
    """A load for `replay`: says how many replicas it needs, and serves on those that there are.

    need: what the busy seconds of the last steps would fill to `filled` of the slots, the most of
    the last `memory_steps`, between least and most.
    """

    def __init__(
        self,
        arrivals: Iterator[Request],
        speed: ReplicaSpeed,
        *,
        least: int = 1,
        most: int = 100,
        filled: float = 0.7,
        memory_steps: int = 6,
    ) -> None:
        self.speed = speed
        self.first_s, self.whole_s, self.token_s = Quantiles(), Quantiles(), Quantiles()
        self.recent_first_s = Quantiles()  # of those that ended since somebody last emptied it
        self.served = self.moved = self.restarted = 0
        self.lost_tokens = 0.0
        self.arrived_tokens = self.queued_tokens = 0
        self.draining: set[int] = set()  # machines that take no new work
        self._arrivals, self._next = arrivals, next(arrivals, None)
        self._queue: deque[Request] = deque()
        self._slots: list[tuple[float, int]] = []  # free from, machine
        self._running: dict[int, list[_Running]] = {}
        self._least, self._most, self._filled = least, most, filled
        self._from_s = self._busy_s = 0.0
        self._recent: deque[float] = deque([0.0] * memory_steps, maxlen=memory_steps)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def need(self, period_s: float) -> int:
        """Replicas for the coming step."""
        slots = max(self._recent) / (period_s * self._filled)
        return min(self._most, max(self._least, math.ceil(slots / self.speed.slots)))

    def advance(self, from_s: float, until_s: float, nodes: Sequence[Node]) -> None:
        """Serve from from_s until until_s on the machines held, each from its ready_s on."""
        self._join(nodes)
        self._from_s, self._busy_s = from_s, 0.0
        while (self._queue or self._take(until_s)) and self._start(self._queue[0], until_s):
            self.queued_tokens -= self._queue.popleft().tokens
        while self._take(until_s):
            pass
        self._recent.append(self._busy_s)
        for node, running in self._running.items():
            self._running[node] = [one for one in running if not self._ended(one, until_s)]

    def _take(self, until_s: float) -> bool:
        """The next arrival joins the queue; False when none is due."""
        if self._next is None or self._next.arrival_s > until_s:
            return False
        self._busy_s += self.speed.takes_s(self._next)
        self._queue.append(self._next)
        self.arrived_tokens += self._next.tokens
        self.queued_tokens += self._next.tokens
        self._next = next(self._arrivals, None)
        return True

    def _ended(self, one: "_Running", by_s: float) -> bool:
        """It is over by then, and counted."""
        if one.end_s > by_s:
            return False
        self.served += 1
        request = one.request
        self.first_s.add(one.first_s - request.arrival_s)
        self.recent_first_s.add(one.first_s - request.arrival_s)
        self.whole_s.add(one.end_s - request.arrival_s)
        self.token_s.add((one.end_s - one.first_s) / max(1, request.output_tokens - 1))
        return True

    def running(self, node: int) -> int:
        """Requests that it is serving."""
        return len(self._running.get(node, ()))

    def lost(self, now_s: float, nodes: Sequence[Node]) -> None:
        """Machines that the market took: what they were serving is served elsewhere, first."""
        back: list[Request] = []
        for node in nodes:
            for one in self._running.pop(node.id, []):
                if not self._ended(one, now_s):
                    back.append(self._taken_up(one, now_s))
        self._queue.extendleft(sorted(back, key=lambda request: -request.arrival_s))
        self.queued_tokens += sum(request.tokens for request in back)

    def _taken_up(self, one: _Running, now_s: float) -> Request:
        """The request as it goes on elsewhere."""
        request = one.request
        prompt_s = request.input_tokens / self.speed.prompt_tokens_per_s
        made = max(0.0, now_s - one.start_s - prompt_s) / self.speed.token_s
        if made >= 1:
            request = request._replace(first_s=one.first_s)
        if self.speed.hand_over_s is None or made < 1:
            self.restarted += 1
            self.lost_tokens += made
            return request._replace(done_tokens=0.0)
        self.moved += 1
        return request._replace(
            done_tokens=min(request.output_tokens - 1.0, request.done_tokens + made)
        )

    def _join(self, nodes: Sequence[Node]) -> None:
        held = {node.id for node in nodes}
        free = held - self.draining
        self._slots = [slot for slot in self._slots if slot[1] in free]
        for node in nodes:
            if node.id not in self._running:
                self._running[node.id] = []
                self._slots += [(node.ready_s, node.id)] * self.speed.slots
        for gone in self._running.keys() - held:
            for one in self._running.pop(
                gone
            ):  # given back: drained, its last requests end in peace
                self._ended(one, math.inf)
        heapq.heapify(self._slots)

    def _start(self, request: Request, until_s: float) -> bool:
        """Give it the slot that is free first; False when none is before until_s."""
        if not self._slots:
            return False
        free_s, node = self._slots[0]
        start_s = max(free_s, request.arrival_s, self._from_s)
        if start_s >= until_s:
            return False
        end_s = start_s + self.speed.takes_s(request)
        first_s = request.first_s
        if first_s is None:
            first_s = start_s + request.input_tokens / self.speed.prompt_tokens_per_s
        heapq.heapreplace(self._slots, (end_s, node))
        self._running[node].append(_Running(end_s, start_s, first_s, request))
        return True


def daily_arrivals(
    requests: int,
    span_s: float,
    *,
    seed: int,
    swing: float = 0.5,
    period_s: float = 300.0,
    input_tokens: float = 1000.0,
    output_tokens: float = 200.0,
) -> Iterator[Request]:
    """About so many requests over span_s, as a Poisson process whose rate swings by `swing` over
    each day, with log-normal lengths of these means (sigma 0.5 and 0.7). Drawn step by step."""
    draws = np.random.default_rng(seed)
    rate = requests / span_s
    for step in range(math.ceil(span_s / period_s)):
        start_s = step * period_s
        here = rate * (1 + swing * math.sin(2 * math.pi * (start_s / 86_400 - 0.25)))
        times = np.sort(draws.random(draws.poisson(here * period_s))) * period_s + start_s
        sizes = zip(
            times.tolist(),
            _lengths(draws, input_tokens, 0.5, len(times)),
            _lengths(draws, output_tokens, 0.7, len(times)),
            strict=True,
        )
        for at_s, prompt, answer in sizes:
            yield Request(at_s, prompt, answer)


def _lengths(draws: np.random.Generator, mean: float, sigma: float, count: int) -> list[int]:
    values = draws.lognormal(math.log(mean) - sigma * sigma / 2, sigma, count)
    return [int(value) for value in np.maximum(1, np.rint(values))]
