"""Proof rows of the hand-off: from how many prompt tokens on a remote prefill costs less
than the time it frees on decode, and what it spares the streams that run there.

Two services take turns: one hands every prompt over, one none. Prompts are fresh token ids, so that
nothing is found in a cache.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from cluster.settings import HandoffSettings
from serve.bench import stream_times
from tests.live.service import MODEL, LiveService, service
from tests.prove.engine import sequence
from tests.prove.row import Row

LENGTHS_TOKENS = (16, 64, 256, 512)
ROUNDS = 5
LONG_TOKENS = 512
ARRIVALS = 4


class Sides(NamedTuple):
    """The service that hands every prompt over, and the one that hands over none."""

    remote: LiveService
    local: LiveService


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    with service("handoff.min_tokens=0") as remote, service("handoff.min_tokens=16384") as local:
        sides = Sides(remote, local)
        yield crossing(sides)
        yield spared(sides)


def crossing(sides: Sides) -> Row:
    """Overhead of a hand-off over the time that a prompt token takes: tokens that pay for it."""
    seconds = {n: _first_token_s(sides, n) for n in LENGTHS_TOKENS}
    overheads_s = [seconds[n].remote - seconds[n].local for n in LENGTHS_TOKENS]
    shortest, longest = LENGTHS_TOKENS[0], LENGTHS_TOKENS[-1]
    token_s = (seconds[longest].local - seconds[shortest].local) / (longest - shortest)
    overhead_s = statistics.median(overheads_s)
    pays_tokens = max(overhead_s, 0.0) / token_s
    default_tokens = HandoffSettings().min_tokens
    handed = sides.remote.states("decode"), sides.local.states("decode")
    counted = [sum(s["remote_prefills"] for s in states.values()) for states in handed]
    measured = f"{pays_tokens:.0f} tokens ({overhead_s * 1e3:.1f} ms against "
    measured += f"{token_s * 1e3:.2f} ms a token; {counted[0]} and {counted[1]} handed over)"
    ok = pays_tokens <= default_tokens and counted[0] > 0 == counted[1]
    return Row(
        "a remote prefill pays from", f"<= handoff.min_tokens = {default_tokens}", measured, ok
    )


class Seconds(NamedTuple):
    """Medians of the time to the first token."""

    remote: float
    local: float


def _first_token_s(sides: Sides, prompt_tokens: int) -> Seconds:
    taken: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for side, live in enumerate(sides):
            started_s = time.perf_counter()
            _complete(live, prompt_tokens, 1009 * turn + 7 * prompt_tokens, 1)
            if turn:  # the first one warms up
                taken[side].append(time.perf_counter() - started_s)
    return Seconds(*map(statistics.median, taken))


def _complete(live: LiveService, prompt_tokens: int, offset: int, max_tokens: int) -> None:
    prompt = sequence("", prompt_tokens, max_tokens, offset=offset).request.prompt
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    httpx.post(f"{live.url}/v1/completions", json=body, timeout=120).raise_for_status()


def spared(sides: Sides) -> Row:
    """The largest gap of a running stream while long prompts arrive, handed over and not."""
    gaps: list[list[float]] = [[], []]
    for turn in range(ROUNDS):
        for side, live in enumerate(sides):
            gaps[side].append(_largest_gap_s(live, turn))
    remote_s, local_s = map(statistics.median, gaps)
    ratio = remote_s / local_s
    measured = f"{ratio:.2f} ({remote_s * 1e3:.0f} ms against {local_s * 1e3:.0f} ms)"
    name = f"largest gap of a stream while {LONG_TOKENS}-token prompts arrive, handed over / not"
    return Row(name, "< 1", measured, ratio < 1)


def _largest_gap_s(live: LiveService, turn: int) -> float:
    """Of a stream that runs through the arrivals."""
    arrivals = threading.Thread(target=_arrive, args=(live, turn))
    question: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "seed": turn}
    times: list[float] = []
    for at_s in stream_times(live.url, f"{turn}. Count the waves.", question):
        times.append(at_s)
        if len(times) == 5:
            arrivals.start()
    arrivals.join()
    return max(b - a for a, b in zip(times, times[1:], strict=False))


def _arrive(live: LiveService, turn: int) -> None:
    for n in range(ARRIVALS):
        _complete(live, LONG_TOKENS, 31 * (ARRIVALS * turn + n) + 5, 1)
