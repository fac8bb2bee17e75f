"""How long requests take on replicas that prefill, that decode or that do both, and the most
requests per second at which enough of them keep their limits: goodput (DistServe, OSDI 24).

Event by event, in seconds. Phases apart feed forward: a pool of prefill replicas, the hand-over of
keys and values, a pool of decode replicas; each request goes to the replica with the least work.
Together, prompts go first and stop decoding while they run."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from autoscale.placement.demand import Slo


class PhaseTimes(Protocol):
    """Seconds of one pass of a whole model, without pipeline stages."""

    def prompt_s(self, lengths: Sequence[int]) -> float:
        """Of prompts computed together."""
        ...

    def decode_s(self, sequences: float, context_tokens: float) -> float:
        """Of one token each; context_tokens: of all of them together."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """Times fitted to measurements, in milliseconds: of prompts a + b * sum(length) + c *
    sum(length ** 2), of decoding a + b * context tokens + c * sequences, one fit below and one from
    `threshold` sequences on (the form of DistServe's published profiles)."""

    prompt_ms: tuple[float, float, float]
    decode_small_ms: tuple[float, float, float]
    decode_large_ms: tuple[float, float, float]
    threshold: int

    def prompt_s(self, lengths: Sequence[int]) -> float:
        a, b, c = self.prompt_ms
        return (a + b * sum(lengths) + c * sum(n * n for n in lengths)) / 1000.0

    def decode_s(self, sequences: float, context_tokens: float) -> float:
        small = sequences < self.threshold
        a, b, c = self.decode_small_ms if small else self.decode_large_ms
        return (a + b * context_tokens + c * sequences) / 1000.0


class Arrival(NamedTuple):
    """A request: when it comes, its prompt's and its answer's tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int


class Served(NamedTuple):
    """Seconds to the first token, and from token to token on average."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Replica:
    """One replica. kv_tokens: whose keys and values fit. stages: of its pipeline, which passes
    prompts through like a production line, and decodes its sequences in as many groups.
    batch_tokens: prompts are computed together until they are so many tokens (beyond, a GPU is busy
    anyway and a larger batch only waits); at least one prompt."""

    times: PhaseTimes
    kv_tokens: int
    stages: int = 1
    batch_tokens: int = 512

    def step_s(self, sequences: int, context_tokens: int) -> float:
        return self.times.decode_s(sequences / self.stages, context_tokens / self.stages)


def mean_ttft_s(prompt_s: float, requests_per_s: float, stages: int = 1) -> float:
    """M/D/1: D + R Dm ** 2 / (2 (1 - R Dm)) with Dm = D / stages (DistServe, equations 1 and 2);
    infinite at and beyond saturation."""
    slot_s = prompt_s / stages
    if requests_per_s * slot_s >= 1:
        return float("inf")
    return prompt_s + requests_per_s * slot_s**2 / (2 * (1 - requests_per_s * slot_s))


@dataclass
class _Prefill:
    """A prefill replica as time goes on."""

    replica: Replica
    queue: deque[int] = field(default_factory=deque)
    tokens: int = 0  # in the queue
    free_s: float = 0.0  # when the next batch may start

    def advance(self, until_s: float, arrivals: Sequence[Arrival], first_s: list[float]) -> None:
        """Start every batch that starts before until_s."""
        while self.queue:
            start_s = max(self.free_s, arrivals[self.queue[0]].at_s)
            if start_s >= until_s:
                return
            batch: list[int] = []
            lengths: list[int] = []
            while self.queue and arrivals[self.queue[0]].at_s <= start_s:
                length = arrivals[self.queue[0]].input_tokens
                if batch and sum(lengths) + length > self.replica.batch_tokens:
                    break
                batch.append(self.queue.popleft())
                lengths.append(length)
            took_s = self.replica.times.prompt_s(lengths)
            self.tokens -= sum(lengths)
            self.free_s = start_s + took_s / self.replica.stages
            for number in batch:
                first_s[number] = start_s + took_s

    def load_s(self, now_s: float) -> float:
        """About how long a request that comes now waits."""
        queued = self.replica.times.prompt_s([self.tokens]) if self.tokens else 0.0
        return max(0.0, self.free_s - now_s) + queued / self.replica.stages


def prefill(arrivals: Sequence[Arrival], replicas: Sequence[Replica]) -> list[float]:
    """When the first token of each request is there; arrivals in the order of time."""
    pool = [_Prefill(each) for each in replicas]
    first_s = [0.0] * len(arrivals)
    for number, arrival in enumerate(arrivals):
        for each in pool:
            each.advance(arrival.at_s, arrivals, first_s)
        least = min(pool, key=lambda each: each.load_s(arrival.at_s))
        least.queue.append(number)
        least.tokens += arrival.input_tokens
    for each in pool:
        each.advance(float("inf"), arrivals, first_s)
    return first_s


@dataclass
class _Decode:
    """A decode replica as time goes on: continuous batches, a request admitted when its keys and
    values fit. Contexts are counted together, so a step costs the same for any batch."""

    replica: Replica
    ready_s: Sequence[float]
    arrivals: Sequence[Arrival]
    now_s: float = 0.0
    waiting: deque[int] = field(default_factory=deque)
    ends: list[tuple[int, int]] = field(default_factory=list)  # (step, request), a heap
    steps: int = 0
    context: int = 0
    reserved: int = 0

    def advance(self, until_s: float, last_s: list[float]) -> None:
        """Take every step that starts before until_s: what comes then may still join."""
        while self.waiting or self.ends:
            if not self.ends:
                self.now_s = max(self.now_s, self.ready_s[self.waiting[0]])
            if self.now_s >= until_s:
                return
            self._admit()
            self._step(last_s)

    def _admit(self) -> None:
        while self.waiting and self.ready_s[self.waiting[0]] <= self.now_s:
            arrival = self.arrivals[self.waiting[0]]
            need = arrival.input_tokens + arrival.output_tokens
            if self.ends and self.reserved + need > self.replica.kv_tokens:
                return
            number = self.waiting.popleft()
            heapq.heappush(self.ends, (self.steps + arrival.output_tokens - 1, number))
            self.reserved += need
            self.context += arrival.input_tokens + 1

    def _step(self, last_s: list[float]) -> None:
        self.now_s += self.replica.step_s(len(self.ends), self.context)
        self.steps += 1
        self.context += len(self.ends)
        self._finish(last_s)

    def _finish(self, last_s: list[float]) -> None:
        while self.ends and self.ends[0][0] <= self.steps:
            _, number = heapq.heappop(self.ends)
            arrival = self.arrivals[number]
            last_s[number] = self.now_s
            self.reserved -= arrival.input_tokens + arrival.output_tokens
            self.context -= arrival.input_tokens + arrival.output_tokens

    def load(self) -> float:
        """Tokens in hand and waiting against what fits."""
        waiting = sum(self.arrivals[n].input_tokens for n in self.waiting)
        return (self.reserved + waiting) / self.replica.kv_tokens


def decode(
    arrivals: Sequence[Arrival], ready_s: Sequence[float], replicas: Sequence[Replica]
) -> list[float]:
    """When the last token of each is there, ready_s being when its keys and values have come."""
    pool = [_Decode(each, ready_s, arrivals) for each in replicas]
    last_s = list(ready_s)
    for number in sorted(range(len(arrivals)), key=ready_s.__getitem__):
        if arrivals[number].output_tokens < 2:
            continue
        for each in pool:
            each.advance(ready_s[number], last_s)
        min(pool, key=_Decode.load).waiting.append(number)
    for each in pool:
        each.advance(float("inf"), last_s)
    return last_s


def disaggregated(
    arrivals: Sequence[Arrival],
    prefills: Sequence[Replica],
    decodes: Sequence[Replica],
    handover_s: Callable[[int], float] = lambda tokens: 0.0,
) -> list[Served]:
    """Phases apart. handover_s: of the keys and values of so many prompt tokens, which delays the
    second token."""
    first_s = prefill(arrivals, prefills)
    ready_s = [
        first + handover_s(arrival.input_tokens)
        for first, arrival in zip(first_s, arrivals, strict=True)
    ]
    return _served(arrivals, first_s, decode(arrivals, ready_s, decodes))


@dataclass
class _Both(_Decode):
    """A replica that does both: prompts first, decoding waits for them."""

    first_s: list[float] = field(default_factory=list)

    def _admit(self) -> None:
        batch: list[int] = []
        lengths: list[int] = []
        while self.waiting and self.ready_s[self.waiting[0]] <= self.now_s:
            arrival = self.arrivals[self.waiting[0]]
            need = arrival.input_tokens + arrival.output_tokens
            full = self.reserved + need > self.replica.kv_tokens
            enough = sum(lengths) + arrival.input_tokens > self.replica.batch_tokens
            if (full and (self.ends or batch)) or (enough and batch):
                break
            batch.append(self.waiting.popleft())
            lengths.append(arrival.input_tokens)
            self.reserved += need
        took_s = self.replica.times.prompt_s(lengths) if batch else 0.0
        for number in batch:
            arrival = self.arrivals[number]
            self.first_s[number] = self.now_s + took_s
            heapq.heappush(self.ends, (self.steps + arrival.output_tokens - 1, number))
            self.context += arrival.input_tokens + 1
        self.now_s += took_s / self.replica.stages

    def advance(self, until_s: float, last_s: list[float]) -> None:
        while self.waiting or self.ends:
            if not self.ends:
                self.now_s = max(self.now_s, self.ready_s[self.waiting[0]])
            if self.now_s >= until_s:
                return
            before = self.now_s
            self._admit()
            if self.now_s == before:
                self._step(last_s)
            self._finish(last_s)  # answers of one token are over with their prompt


def colocated(arrivals: Sequence[Arrival], replicas: Sequence[Replica]) -> list[Served]:
    """Every replica does both phases."""
    at_s = [arrival.at_s for arrival in arrivals]
    first_s, last_s = [0.0] * len(arrivals), [0.0] * len(arrivals)
    pool = [_Both(each, at_s, arrivals, first_s=first_s) for each in replicas]
    for number in range(len(arrivals)):
        for each in pool:
            each.advance(at_s[number], last_s)
        min(pool, key=_Decode.load).waiting.append(number)
    for each in pool:
        each.advance(float("inf"), last_s)
    return _served(arrivals, first_s, last_s)


def _served(
    arrivals: Sequence[Arrival], first_s: Sequence[float], last_s: Sequence[float]
) -> list[Served]:
    return [
        Served(first - arrival.at_s, (last - first) / max(1, arrival.output_tokens - 1))
        for arrival, first, last in zip(arrivals, first_s, last_s, strict=True)
    ]


def attained(served: Sequence[Served], slo: Slo) -> float:
    """The share of requests within both limits."""
    ttft_s = float("inf") if slo.ttft_s is None else slo.ttft_s
    tpot_s = float("inf") if slo.tpot_s is None else slo.tpot_s
    return sum(s.ttft_s <= ttft_s and s.tpot_s <= tpot_s for s in served) / len(served)


def poisson(
    lengths: Sequence[tuple[int, int]], requests_per_s: float, seed: int = 0
) -> list[Arrival]:
    """Requests of these lengths at exponential distances; the same ones for a seed, at every rate
    only nearer or farther."""
    gaps = np.random.default_rng(seed).exponential(1.0, len(lengths)) / requests_per_s
    times = accumulate(gaps.tolist())
    return [Arrival(at, *pair) for at, pair in zip(times, lengths, strict=True)]


def goodput(
    serve: Callable[[Sequence[Arrival]], list[Served]],
    lengths: Sequence[tuple[int, int]],
    slo: Slo,
    *,
    most: float,
    seed: int = 0,
    tolerance: float = 0.005,
) -> float:
    """Most requests per second, up to `most`, of which slo.attained keep the limits; 0.0 where even
    a hundredth of `most` does not. By bisection over one sequence of arrivals."""

    def holds(requests_per_s: float) -> bool:
        return attained(serve(poisson(lengths, requests_per_s, seed)), slo) >= slo.attained

    low, high = 0.0, most
    if holds(most):
        return most
    while high - low > tolerance * high and high > most / 100:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
