"""What servers do under more and more streams, and with longer and longer context: throughput and
first tokens over HTTP, all servers in turns. Called by tests/prove/kernel_http.py.

A server that fails once is out from then on, with all its figures; why is in `failed`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from tests.peers.load import Answer, Endpoint, Question, ask, words
from tests.peers.measures import Running, first_after_seen, sentence

PROMPT_TOKENS = 128
NEW_TOKENS = 64
ALONE = 3  # questions one after the other where there is one stream: a p90 needs some
CONTEXT_NEW_TOKENS = 32
Figure = TypeVar("Figure")


class Point(NamedTuple):
    """What a server did in a load. first_s: of each answer."""

    tokens_per_s: float
    first_s: tuple[float, ...]


class Context(NamedTuple):
    """One stream's tokens per second over a prompt of some length."""

    prefill: float
    decode: float


class Keeper(Protocol):
    """late: whether a run should begin nothing more. save: called after each cell."""

    def late(self) -> bool: ...

    def save(self) -> None: ...


@dataclass
class Taken:
    """Everything, by load and server, a round each. done: the cells, each a question and a server
    that was asked it. left: how many were not asked, because it was late."""

    streams: dict[int, dict[str, list[Point]]] = field(default_factory=dict)
    contexts: dict[int, dict[str, list[Context]]] = field(default_factory=dict)
    seen: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    left: int = 0

    def fail(self, server: str, reason: str) -> None:
        """Why a server is out, and none of its figures."""
        self.failed[server] = reason
        for points in self.streams.values():
            points.pop(server, None)
        for lengths in self.contexts.values():
            lengths.pop(server, None)
        self.seen.pop(server, None)

    def rate(self, streams: int, server: str) -> float:
        """Median tokens per second. KeyError when there are no figures."""
        return statistics.median(point.tokens_per_s for point in self.streams[streams][server])

    def first_p90_s(self, streams: int, server: str) -> float:
        """Over the answers of all rounds. KeyError when there are none."""
        firsts = sorted(s for point in self.streams[streams][server] for s in point.first_s)
        return firsts[math.ceil(0.9 * len(firsts)) - 1]

    def first_seen_s(self, server: str) -> float:
        """Median first token of a prompt that is new only at its end. KeyError as above."""
        return statistics.median(self.seen[server])


def take_streams(
    peers: Running,
    taken: Taken,
    streams: Iterable[int],
    rounds: int,
    keeper: Keeper | None = None,
) -> None:
    """Each number of streams goes round all servers, `rounds` times."""
    wanted = list(streams)
    for turn in range(rounds):
        for count in wanted:
            seed = f"{count} streams, round {turn}"
            found = taken.streams.setdefault(count, {})
            ask_all = partial(point, seed=seed, streams=count)
            _round(peers, taken, found, ask_all, seed, keeper)


def take_seen(peers: Running, taken: Taken, rounds: int, keeper: Keeper | None = None) -> None:
    """First tokens after a prefix that was there before."""
    for turn in range(rounds):
        seed = f"seen before, round {turn}"
        _round(peers, taken, taken.seen, partial(first_after_seen, seed=seed), seed, keeper)


def take_contexts(
    peers: Running,
    taken: Taken,
    lengths: Iterable[int],
    names: Mapping[str, str],
    keeper: Keeper | None = None,
) -> None:
    """Each length goes round the servers of `names`, which says as whom each one counts."""
    some = Running({names[n]: e for n, e in peers.endpoints.items() if n in names}, peers.failed)
    for length in lengths:
        seed = f"context {length}"
        found = taken.contexts.setdefault(length, {})
        _round(some, taken, found, partial(context, seed=seed, tokens=length), seed, keeper)


def point(endpoint: Endpoint, seed: str, streams: int) -> Point:
    """Questions that are sent at once; of one stream, one after the other."""
    count = ALONE if streams == 1 else streams
    prompts = [words(PROMPT_TOKENS, f"{seed}, {n}") for n in range(count)]
    answers: list[Answer] = []
    started_s = time.perf_counter()
    for first in range(0, count, streams):
        some = prompts[first : first + streams]
        answers += ask(endpoint, [Question(prompt, NEW_TOKENS) for prompt in some])
    passed_s = time.perf_counter() - started_s
    made = sum(answer.completion_tokens for answer in answers)
    return Point(made / passed_s, tuple(answer.first_s for answer in answers))


def context(endpoint: Endpoint, seed: str, tokens: int) -> Context:
    """A prompt that nobody has seen, and a short answer."""
    [answer] = ask(endpoint, [Question(words(tokens, seed), CONTEXT_NEW_TOKENS)])
    gaps_s = answer.last_s - answer.first_s
    return Context(tokens / answer.first_s, (answer.completion_tokens - 1) / gaps_s)


def _round(
    peers: Running,
    taken: Taken,
    found: dict[str, list[Figure]],
    take: Callable[[Endpoint], Figure],
    seed: str,
    keeper: Keeper | None,
) -> None:
    for name, endpoint in peers.endpoints.items():
        cell = f"{seed}: {name}"
        if name in taken.failed or cell in taken.done:
            continue
        if keeper is not None and keeper.late():
            taken.left += 1
            continue
        try:
            figure = take(endpoint)
        # Another person's program: the table says what went wrong.
        except Exception as error:
            taken.fail(name, sentence(error))
        else:
            found.setdefault(name, []).append(figure)
        taken.done.add(cell)
        if keeper is not None:
            keeper.save()
