"""What the peers are compared by, and in which order: every measure goes round all servers in
turns (A B C D, A B C D, ...), so that a slow minute of the machine meets all of them.

All servers stay up, and only one has work at a time. Every server is asked the same questions.
Called by tests/prove/peers.py and `python -m tests.peers`.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from serve.arrivals import trace
from serve.bench import Slo
from tests.peers.engines import ENGINES
from tests.peers.load import (
    Endpoint,
    Question,
    ask,
    goodput_per_s,
    replayed,
    tokens_per_s,
    words,
)

TRACE = (
    Path(__file__).parents[3] / "shared" / "data" / "azure-llm" / "AzureLLMInferenceTrace_code.csv"
)
COMPARED = ("sanderling", "llama.cpp", "vLLM", "transformers")
PROMPT_TOKENS = 64
NEW_TOKENS = {1: 24, 8: 24, 32: 16, 64: 16}  # by streams
PREFILL_TOKENS = 512
TAIL_TOKENS = 16
FIRST_TOKENS = 3  # first tokens timed in a round
# The trace is of a machine hundreds of times as fast: a prompt of it is 1/16 as long here.
REQUESTS, SPEED, SHRINK, MOST_NEW_TOKENS = 48, 1.5, 16, 24
SLO = Slo(first_s=5.0, gap_s=0.25)
ROUNDS = 3
REPLAYS = 2


class Measure(NamedTuple):
    """A number taken from a server with questions made from a seed, and which is better."""

    name: str
    unit: str
    more_is_better: bool
    rounds: int
    take: Callable[[Endpoint, str], float]


@dataclass
class Result:
    """The numbers of each server, a round each, and why a server gave none."""

    measure: Measure
    values: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def speed(self, name: str, peer: str) -> float:
        """How many times as fast as a peer, by the medians; inf when that did nothing at all."""
        own, other = self.median(name), self.median(peer)
        above, below = (own, other) if self.measure.more_is_better else (other, own)
        return above / below if below else math.inf


class Running(NamedTuple):
    """Servers that answer, by name, and why the others do not."""

    endpoints: dict[str, Endpoint]
    failed: dict[str, str]


def measures() -> list[Measure]:
    """All of them, in the order of the table."""
    made = [
        Measure(f"{streams} streams", "tokens/s", True, ROUNDS, _streams(streams))
        for streams in NEW_TOKENS
    ]
    made.append(Measure(f"first token after {PREFILL_TOKENS} new", "s", False, ROUNDS, _cold))
    warm = f"first token after {PREFILL_TOKENS} seen before and {TAIL_TOKENS} new"
    made.append(Measure(warm, "s", False, ROUNDS, first_after_seen))
    promise = f"first {SLO.first_s:g} s, gaps {SLO.gap_s:g} s"
    replay = f"{REQUESTS} requests of Azure's code trace within {promise}"
    return [*made, Measure(replay, "per s", True, REPLAYS, _replay)]


@contextlib.contextmanager
def running(names: Sequence[str]) -> Iterator[Running]:
    """Starts the servers one after the other and warms each up; ends them all."""
    found = Running({}, {})
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                endpoint = stack.enter_context(ENGINES[name].run())
                _warm_up(endpoint)
            # Another person's program, or what installs it: the table says what went wrong.
            except Exception as error:
                found.failed[name] = sentence(error)
            else:
                found.endpoints[name] = endpoint
        yield found


def compare(peers: Running, measure: Measure) -> Result:
    """One measure, in turns. A server that fails once is left out from then on."""
    result = Result(measure, {}, dict(peers.failed))
    for turn in range(measure.rounds):
        for name, endpoint in peers.endpoints.items():
            if name not in result.failed:
                try:
                    taken = measure.take(endpoint, f"{measure.name}, round {turn}")
                except Exception as error:  # as above
                    result.failed[name] = sentence(error)
                else:
                    result.values.setdefault(name, []).append(taken)
    for name in result.failed:
        result.values.pop(name, None)
    return result


def _streams(streams: int) -> Callable[[Endpoint, str], float]:
    def take(endpoint: Endpoint, seed: str) -> float:
        prompts = (words(PROMPT_TOKENS, f"{seed}, stream {n}") for n in range(streams))
        questions = [Question(prompt, NEW_TOKENS[streams]) for prompt in prompts]
        return tokens_per_s(endpoint, questions)

    return take


def _cold(endpoint: Endpoint, seed: str) -> float:
    return _first_s(endpoint, [words(PREFILL_TOKENS, f"{seed}, {n}") for n in range(FIRST_TOKENS)])


def first_after_seen(endpoint: Endpoint, seed: str) -> float:
    """Seconds to the first token of a prompt whose beginning was asked before, a median."""
    common = words(PREFILL_TOKENS, seed)
    prompts = [f"{common} {words(TAIL_TOKENS, f'{seed}, {n}')}" for n in range(FIRST_TOKENS + 1)]
    ask(endpoint, [Question(prompts.pop(), 1)])
    return _first_s(endpoint, prompts)


def _first_s(endpoint: Endpoint, prompts: Sequence[str]) -> float:
    """Median over prompts that are sent one after the other, each for one token."""
    answers = (ask(endpoint, [Question(prompt, 1)])[0] for prompt in prompts)
    return statistics.median(answer.first_s for answer in answers)


def _replay(endpoint: Endpoint, seed: str) -> float:
    arrivals = [
        arrival._replace(
            prompt_tokens=max(arrival.prompt_tokens // SHRINK, 1),
            max_tokens=min(arrival.max_tokens, MOST_NEW_TOKENS),
        )
        for arrival in trace(TRACE, REQUESTS, SPEED)
    ]
    return goodput_per_s(endpoint, replayed(arrivals, seed), SLO)


def _warm_up(endpoint: Endpoint) -> None:
    """One long prompt, then a few at once: whatever is compiled or allocated at first use is."""
    ask(endpoint, [Question(words(PREFILL_TOKENS, "warm up"), 2)])
    ask(endpoint, [Question(words(PROMPT_TOKENS, f"warm up {n}"), 4) for n in range(8)])


def sentence(error: Exception) -> str:
    """The last line of what an error says, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"
