"""A plan under load, event by event: Poisson arrivals, routers, batched replicas, hand-offs.

Knows the times of single steps and nothing of any planner's formulas, so that it can judge their
plans. Replicas batch continuously: each step computes prompts up to a budget of tokens and one
token of every running sequence; a sequence is admitted when its whole length has room.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autoscale.catalog.profile import StepTimes
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import Plan, Purchase, Role

BUDGET_TOKENS = 2048  # of prompts in one step
WARM_UP = 0.25  # share of the arrivals that find a fleet emptier than it will be
LONGEST = 20_000  # requests

StepS = Callable[[float, float, float], float]


class Outcome(NamedTuple):
    """attained: share of the measured requests within the SLO; ttft_s and tpot_s: what the SLO's
    share of them keep; requests: how many were measured."""

    attained: float
    ttft_s: float
    tpot_s: float
    requests: int


@dataclass
class Request:
    """One request on its way. first_s, last_s: when its first and its last token came."""

    bucket: Bucket
    arrival_s: float
    prompt_done: int = 0
    made: int = 0
    first_s: float = float("inf")
    last_s: float = float("inf")

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        gaps = self.bucket.output_tokens - 1
        return (self.last_s - self.first_s) / gaps if gaps > 0 else 0.0

    def within(self, slo: Slo) -> bool:
        first = slo.ttft_s is None or self.ttft_s <= slo.ttft_s
        return first and (slo.tpot_s is None or self.tpot_s <= slo.tpot_s)


@dataclass
class Server:
    """One replica. `start` begins a step and says how long it takes; `end` applies it and gives the
    requests that leave."""

    step_s: StepS
    kv_tokens: int
    role: Role
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    used_tokens: int = 0
    queued_tokens: int = 0
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    busy: bool = False

    def room(self, request: Request) -> int:
        """Tokens that the request will need here."""
        answer = 0 if self.role == "prefill" else request.bucket.output_tokens
        return request.bucket.input_tokens + answer

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.queued_tokens += sum(request.bucket)

    def start(self) -> float | None:
        """Seconds of the next step; None when there is nothing to do."""
        while self.waiting and self.used_tokens + self.room(self.waiting[0]) <= self.kv_tokens:
            admitted = self.waiting.popleft()
            self.used_tokens += self.room(admitted)
            self.running.append(admitted)
        self.chunks, left = [], BUDGET_TOKENS
        for request in self.running:
            tokens = min(left, request.bucket.input_tokens - request.prompt_done)
            if tokens > 0:
                self.chunks.append((request, tokens))
                left -= tokens
        decoding = [request for request in self.running if request.made]
        if not decoding and not self.chunks:
            return None
        context = sum(request.bucket.input_tokens + request.made for request in decoding)
        prompt = BUDGET_TOKENS - left
        return self.step_s(prompt, len(decoding), context / len(decoding) if decoding else 0.0)

    def end(self, now_s: float) -> list[Request]:
        """The requests that the step ends here, their tokens stamped."""
        for request in self.running:
            if request.made:
                request.made += 1
        for request, tokens in self.chunks:
            request.prompt_done += tokens
            if request.prompt_done == request.bucket.input_tokens:
                request.made, request.first_s = 1, now_s
        left = [request for request in self.running if self._leaves(request)]
        for request in left:
            self.running.remove(request)
            self.used_tokens -= self.room(request)
            self.queued_tokens -= sum(request.bucket)
            if request.made >= request.bucket.output_tokens:
                request.last_s = now_s
        return left

    def _leaves(self, request: Request) -> bool:
        return request.made >= (1 if self.role == "prefill" else request.bucket.output_tokens) > 0


class _Turns:
    """Weighted turns over purchases: each gets its share of any run of requests, within one."""

    def __init__(self, shares: Mapping[int, float]) -> None:
        self.shares = shares
        self.credit = dict.fromkeys(shares, 0.0)

    def next(self) -> int:
        for place, share in self.shares.items():
            self.credit[place] += share
        chosen = max(self.credit, key=lambda place: self.credit[place])
        self.credit[chosen] -= sum(self.shares.values())
        return chosen


class Fleet:
    """The replicas of a plan and who sends what where. handoff_s: from prefill to decode, by prompt
    length in tokens."""

    def __init__(
        self, plan: Plan, servers: Sequence[Sequence[Server]], handoff_s: Callable[[int], float]
    ) -> None:
        self.servers, self.handoff_s = servers, handoff_s
        self.first = {b: _Turns(_of(plan, b, "prefill")) for b in plan.routing}
        self.then = {b: _Turns(_of(plan, b, "decode")) for b in plan.routing}
        self.events: list[tuple[float, int, Server | None, Request | None]] = []
        self.count = 0

    def run(self, requests: Sequence[Request]) -> None:
        """To the end of the last one. Those that fit nowhere never end."""
        for request in requests:
            self._later(request.arrival_s, None, request)
        while self.events:
            now_s, _, server, arrived = heapq.heappop(self.events)
            if arrived is not None:
                turns = self.then if arrived.made else self.first
                server = self._send(turns[arrived.bucket].next(), arrived)
            elif server is not None:
                self._end(server, now_s)
            if server is not None and not server.busy:
                self._start(server, now_s)

    def _later(self, at_s: float, server: Server | None, request: Request | None) -> None:
        self.count += 1
        heapq.heappush(self.events, (at_s, self.count, server, request))

    def _send(self, purchase: int, request: Request) -> Server | None:
        """To the replica with the least to do; None when it fits into none."""
        fit = [s for s in self.servers[purchase] if s.room(request) <= s.kv_tokens]
        if not fit:
            return None
        server = min(fit, key=lambda each: each.queued_tokens)
        server.add(request)
        return server

    def _start(self, server: Server, now_s: float) -> None:
        step_s = server.start()
        server.busy = step_s is not None
        if step_s is not None:
            self._later(now_s + step_s, server, None)

    def _end(self, server: Server, now_s: float) -> None:
        server.busy = False
        for request in server.end(now_s):
            if server.role == "prefill" and request.made < request.bucket.output_tokens:
                self._later(now_s + self.handoff_s(request.bucket.input_tokens), None, request)


def simulate(
    plan: Plan,
    demand: Demand,
    times: StepTimes,
    kv_tokens: Sequence[int],
    *,
    handoff_s: Callable[[int], float] = lambda tokens: 0.0,
    seed: int = 0,
    requests: int | None = None,
) -> Outcome:
    """What a plan's requests experience. kv_tokens: of a replica of each purchase. requests: how
    many arrive; None: enough for a fleet of its size to fill."""
    servers = [_servers(p, times, kv) for p, kv in zip(plan.purchases, kv_tokens, strict=True)]
    replicas = sum(len(each) for each in servers)
    count = requests or min(LONGEST, max(800, 80 * replicas, _residences(plan, demand, times)))
    arriving = _arrivals(demand, count, random.Random(seed))
    Fleet(plan, servers, handoff_s).run(arriving)
    return _outcome(arriving[int(WARM_UP * count) :], demand.slo)


def _servers(purchase: Purchase, times: StepTimes, kv_tokens: int) -> list[Server]:
    shape = purchase.shape

    def step_s(prefill: float, sequences: float, context: float) -> float:
        return times.step_s(shape, prefill, sequences, context)

    return [Server(step_s, kv_tokens, shape.role) for _ in range(purchase.replicas)]


def _residences(plan: Plan, demand: Demand, times: StepTimes) -> int:
    """Requests that arrive in four times as long as the longest takes, not stretched by others."""
    longest_s = max(
        (
            bucket.output_tokens * times.step_s(p.shape, 0, 8, sum(bucket))
            for bucket in demand.requests_per_s
            for p in plan.purchases
            if p.shape.role in ("mixed", "decode")
        ),
        default=0.0,
    )
    return int(min(LONGEST, 4 * longest_s * demand.total_per_s))


def _arrivals(demand: Demand, count: int, chance: random.Random) -> list[Request]:
    buckets = list(demand.requests_per_s)
    weights = [demand.requests_per_s[bucket] for bucket in buckets]
    now_s, arriving = 0.0, []
    for bucket in chance.choices(buckets, weights, k=count):
        now_s += chance.expovariate(demand.total_per_s)
        arriving.append(Request(bucket, now_s))
    return arriving


def _outcome(measured: Sequence[Request], slo: Slo) -> Outcome:
    def kept_by_attained(values: list[float]) -> float:
        return sorted(values)[min(len(values) - 1, int(slo.attained * len(values)))]

    attained = sum(request.within(slo) for request in measured) / len(measured)
    ttft_s = kept_by_attained([request.ttft_s for request in measured])
    tpot_s = kept_by_attained([request.tpot_s for request in measured])
    return Outcome(attained, ttft_s, tpot_s, len(measured))


def _of(plan: Plan, bucket: Bucket, phase: Role) -> dict[int, float]:
    """The shares of a bucket among the purchases that compute a phase of it."""
    return {
        place: share
        for place, share in plan.routing[bucket].items()
        if share > 0 and plan.purchases[place].shape.role in ("mixed", phase)
    }
