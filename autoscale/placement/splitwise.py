"""A cluster whose machines compute prompts, tokens or both, event by event (Splitwise, ISCA 24):
requests join the shortest queue of prompt tokens and the emptiest machine for their answers; a pool
that is full borrows machines of the other, which compute both until they are idle."""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Literal

from autoscale.placement.goodput import Arrival

Pool = Literal["prompt", "token", "mixed"]

BATCH_TOKENS = 2048  # of one iteration
MIXED = 1.1  # prompts take so much longer with tokens beside them
PATIENCE = 4  # iterations that answers wait for prompts in a row
LONG_QUEUE_TOKENS = 8192


@dataclass(frozen=True)
class MachineTimes:
    """Seconds of an iteration over so many prompt tokens, or over one token each of so many
    requests: linear between measured points and along the outermost two beyond them."""

    prompt: tuple[tuple[float, float], ...]
    token: tuple[tuple[float, float], ...]

    def prompt_s(self, tokens: float) -> float:
        return _line(self.prompt, tokens)

    def token_s(self, requests: float) -> float:
        return _line(self.token, requests)


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    pairs = pairwise(points)
    low, high = next((pair for pair in pairs if x <= pair[1][0]), points[-2:])
    share = (x - low[0]) / (high[0] - low[0])
    return low[1] + share * (high[1] - low[1])


def times_from_rows(
    rows: Iterable[Mapping[str, str]], model: str, hardware: str, tensor: int
) -> MachineTimes:
    """From a table of runs with columns model, hardware, tensor_parallel, prompt_size, batch_size,
    prompt_time and token_time (ms), the median of repeated runs. Prompts by tokens in all, answers
    by batch at the most common prompt. ValueError where there are fewer than two points."""
    prompt: dict[float, list[float]] = {}
    token: dict[float, list[float]] = {}
    for row in rows:
        if (row["model"], row["hardware"], int(row["tensor_parallel"])) == (
            model,
            hardware,
            tensor,
        ):
            size, batch = float(row["prompt_size"]), float(row["batch_size"])
            prompt.setdefault(size * batch, []).append(float(row["prompt_time"]) / 1000)
            if size == 512:
                token.setdefault(batch, []).append(float(row["token_time"]) / 1000)
    if len(prompt) < 2 or len(token) < 2:
        raise ValueError(f"no times of {model} on {hardware} at tensor degree {tensor}")
    return MachineTimes(*(_curve(points) for points in (prompt, token)))


def _curve(points: Mapping[float, Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, median(seconds)) for x, seconds in sorted(points.items()))


@dataclass
class Machine:
    """One machine. home: the pool that it belongs to; pool: where it is now. kv_tokens: whose keys
    and values fit."""

    times: MachineTimes
    home: Pool
    kv_tokens: int
    pool: Pool = "mixed"
    prompts: deque[int] = field(default_factory=deque)
    waiting: deque[int] = field(default_factory=deque)  # answers that wait for memory
    ends: list[tuple[int, int]] = field(default_factory=list)  # (step, request), a heap
    batch: list[int] = field(default_factory=list)
    steps: int = 0
    pending_tokens: int = 0  # of prompts that wait or run
    reserved: int = 0  # tokens of answers sent here, with their prompts
    held: int = 0  # of them, tokens that lie in memory
    passed_over: int = 0
    decoding: bool = False
    busy: bool = False

    def __post_init__(self) -> None:
        self.pool = self.home

    @property
    def queue_tokens(self) -> int:
        """Tokens of an iteration's work that is here: prompts, and one for each answer."""
        return self.pending_tokens + len(self.ends) + len(self.waiting)

    @property
    def idle(self) -> bool:
        return not (self.prompts or self.waiting or self.ends or self.batch)


@dataclass(frozen=True)
class Outcome:
    """Of one request, in seconds: to the first token, from token to token, to the end."""

    ttft_s: float
    tbt_s: float
    e2e_s: float


class Cluster:
    """Machines and the requests that go through them. transfer_s: for the keys and values of one
    prompt token between machines, what cannot be hidden behind computing."""

    def __init__(self, machines: Sequence[Machine], *, transfer_s: float = 0.0) -> None:
        self._machines = list(machines)
        self._transfer_s = transfer_s
        self._arrivals: Sequence[Arrival] = ()
        self._events: list[tuple[float, int, str, int]] = []
        self._count = 0
        self._first_s: list[float] = []
        self._last_s: list[float] = []
        self._token_machine: list[int] = []

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """All requests to their end. A request that no machine can hold is an error."""
        roomiest = max(machine.kv_tokens for machine in self._machines)
        if any(a.input_tokens + a.output_tokens > roomiest for a in arrivals):
            raise ValueError(f"a request is longer than the {roomiest} tokens that a machine holds")
        self._arrivals = arrivals
        self._first_s, self._last_s = [0.0] * len(arrivals), [0.0] * len(arrivals)
        self._token_machine = [0] * len(arrivals)
        for number, arrival in enumerate(arrivals):
            self._at(arrival.at_s, "arrival", number)
        while self._events:
            now, _, what, number = heapq.heappop(self._events)
            if what == "arrival":
                self._arrive(number, now)
            elif what == "handover":
                machine = self._machines[self._token_machine[number]]
                machine.waiting.append(number)
                self._start(self._token_machine[number], now)
            else:
                self._finish(number, now)
        return [self._outcome(number) for number in range(len(arrivals))]

    def _at(self, when_s: float, what: str, number: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, what, number))

    def _tokens(self, number: int) -> int:
        return self._arrivals[number].input_tokens + self._arrivals[number].output_tokens

    def _arrive(self, number: int, now: float) -> None:
        prompt = self._arrivals[number].input_tokens
        first = self._for_prompt(prompt)
        then = self._for_token(self._tokens(number))
        if first is None or then is None:
            first = then = min(
                range(len(self._machines)), key=lambda m: self._machines[m].queue_tokens
            )
        elif "mixed" in (self._machines[first].home, self._machines[then].home):
            then = first  # no pools: who computes the prompt answers
        self._token_machine[number] = then
        self._machines[first].prompts.append(number)
        self._machines[first].pending_tokens += prompt
        self._machines[then].reserved += self._tokens(number)
        self._start(first, now)

    def _in_pool(self, pool: Pool) -> list[int]:
        return [m for m, machine in enumerate(self._machines) if machine.pool == pool]

    def _for_prompt(self, prompt: int) -> int | None:
        """The shortest queue of prompt machines, else of mixed ones, else a borrowed token one."""

        def queue(m: int) -> int:
            return self._machines[m].queue_tokens

        pools: tuple[Pool, Pool] = ("prompt", "mixed")
        for pool in pools:
            least = min(self._in_pool(pool), key=queue, default=None)
            short = least is not None and queue(least) + prompt <= LONG_QUEUE_TOKENS
            if least is not None and (short or not self._machines[least].prompts):
                return least
        return self._borrowed(min(self._in_pool("token"), key=queue, default=None))

    def _for_token(self, tokens: int) -> int | None:
        """The emptiest token machine that has room, else a mixed one, else a borrowed prompt
        one."""

        def load(m: int) -> float:
            return self._machines[m].reserved / self._machines[m].kv_tokens

        pools: tuple[Pool, Pool] = ("token", "mixed")
        for pool in pools:
            least = min(self._in_pool(pool), key=load, default=None)
            if least is not None:
                machine = self._machines[least]
                if machine.reserved + tokens <= machine.kv_tokens:
                    return least
        return self._borrowed(min(self._in_pool("prompt"), key=load, default=None))

    def _borrowed(self, m: int | None) -> int | None:
        if m is not None:
            self._machines[m].pool = "mixed"
        return m

    def _start(self, m: int, now: float) -> None:
        machine = self._machines[m]
        if machine.busy:
            return
        self._admit(machine)
        tokens = 0
        if not machine.ends or machine.passed_over < PATIENCE:
            while machine.prompts:
                prompt = self._arrivals[machine.prompts[0]].input_tokens
                if machine.batch and tokens + prompt > BATCH_TOKENS:
                    break
                tokens += prompt
                machine.batch.append(machine.prompts.popleft())
        fits = tokens + len(machine.ends) <= BATCH_TOKENS or not machine.batch
        machine.decoding = bool(machine.ends) and fits
        machine.passed_over = machine.passed_over + 1 if machine.ends and not fits else 0
        if not machine.batch and not machine.ends:
            if machine.idle:
                machine.pool = machine.home
            return
        if machine.batch:
            took_s = machine.times.prompt_s(tokens + (len(machine.ends) if fits else 0))
            took_s *= MIXED if machine.decoding else 1.0
        else:
            took_s = machine.times.token_s(len(machine.ends))
        machine.busy = True
        self._at(now + took_s, "iteration", m)

    def _admit(self, machine: Machine) -> None:
        while machine.waiting:
            number = machine.waiting[0]
            if machine.ends and machine.held + self._tokens(number) > machine.kv_tokens:
                return
            machine.waiting.popleft()
            machine.held += self._tokens(number)
            end = machine.steps + self._arrivals[number].output_tokens - 1
            heapq.heappush(machine.ends, (end, number))

    def _finish(self, m: int, now: float) -> None:
        machine = self._machines[m]
        machine.busy = False
        if machine.decoding:
            machine.steps += 1
            while machine.ends and machine.ends[0][0] <= machine.steps:
                self._leave(machine, heapq.heappop(machine.ends)[1], now)
        for number in machine.batch:
            self._first_s[number] = now
            machine.pending_tokens -= self._arrivals[number].input_tokens
            self._hand_over(m, number, now)
        machine.batch = []
        self._start(m, now)

    def _hand_over(self, m: int, number: int, now: float) -> None:
        then = self._token_machine[number]
        if self._arrivals[number].output_tokens < 2:
            self._last_s[number] = now
            self._machines[then].reserved -= self._tokens(number)
        elif then == m:
            self._machines[m].waiting.append(number)
        else:
            wait_s = self._transfer_s * self._arrivals[number].input_tokens
            self._at(now + wait_s, "handover", number)

    def _leave(self, machine: Machine, number: int, now: float) -> None:
        self._last_s[number] = now
        machine.held -= self._tokens(number)
        machine.reserved -= self._tokens(number)

    def _outcome(self, number: int) -> Outcome:
        arrival = self._arrivals[number]
        answer_s = self._last_s[number] - self._first_s[number]
        return Outcome(
            self._first_s[number] - arrival.at_s,
            answer_s / max(1, arrival.output_tokens - 1),
            self._last_s[number] - arrival.at_s,
        )
