"""A load of streamed completions over HTTP, as any client would send it: closed loop or arrivals.

Used by `sanderling bench serve` and by the first question of `sanderling up`. Latencies are taken
at the client: first token, gaps between tokens, end to end. With arrivals they count from when a
request was due, not from when a busy client came to send it (no coordinated omission).
"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from serve.arrivals import Arrival

TIMEOUT_S = 300.0
MOST_OPEN = 512  # threads; later arrivals wait, and the wait counts
WORDS = ("sand", "tide", "wave", "shell", "gull", "dune", "salt", "wind", "kelp", "crab", "foam")


class Load(NamedTuple):
    """What to send: how many requests, how many at once, about how long."""

    requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Timing:
    """One answer: times in seconds from its sending, and the tokens it cost."""

    first_s: float
    gaps_s: tuple[float, ...]
    total_s: float
    completion_tokens: int
    cached_tokens: int

    def within(self, slo: "Slo") -> bool:
        """First token in time, and the gaps on average."""
        mean_s = sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0
        return self.first_s <= slo.first_s and mean_s <= slo.gap_s


class Slo(NamedTuple):
    """What a user is promised, in seconds: the first token, and the mean gap between tokens."""

    first_s: float
    gap_s: float


NO_SLO = Slo(math.inf, math.inf)


def stream_chat(
    url: str, question: str, *, max_tokens: int, temperature: float, key: str | None = None
) -> Iterator[str]:
    """The pieces of one streamed answer."""
    body = {"max_tokens": max_tokens, "temperature": temperature}
    for event in _events(url, question, body, key):
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def run(url: str, load: Load, key: str | None = None, slo: Slo = NO_SLO) -> dict[str, Any]:
    """Send the load in a closed loop; the report of `sanderling bench serve` (seconds, tokens)."""
    started_s = time.perf_counter()
    with ThreadPoolExecutor(load.concurrency) as pool:
        timings = list(pool.map(lambda n: _time(url, n, load, key), range(load.requests)))
    wall_s = time.perf_counter() - started_s
    return {"load": load._asdict(), **report(timings, wall_s, slo)}


def run_arrivals(
    url: str, arrivals: list[Arrival], key: str | None = None, slo: Slo = NO_SLO
) -> dict[str, Any]:
    """Send each request when it is due, however busy the service is; the same report."""
    started_s = time.perf_counter()

    def one(number: int) -> Timing:
        arrival = arrivals[number]
        due_s = started_s + arrival.at_s
        time.sleep(max(due_s - time.perf_counter(), 0.0))
        load = Load(1, 1, arrival.prompt_tokens, arrival.max_tokens)
        return _time(url, number, load, key, due_s)

    with ThreadPoolExecutor(min(len(arrivals), MOST_OPEN)) as pool:
        timings = list(pool.map(one, range(len(arrivals))))
    wall_s = time.perf_counter() - started_s
    load = {"requests": len(arrivals), "offered_per_s": len(arrivals) / arrivals[-1].at_s}
    return {"load": load, **report(timings, wall_s, slo)}


def report(timings: list[Timing], wall_s: float, slo: Slo) -> dict[str, Any]:
    """Throughput, goodput and quantiles. Goodput: requests per second that kept the promise."""
    gaps = [gap for timing in timings for gap in timing.gaps_s]
    good = sum(timing.within(slo) for timing in timings)
    return {
        "wall_s": wall_s,
        "requests_per_s": len(timings) / wall_s,
        "goodput_per_s": good / wall_s,
        "within_slo": good / len(timings),
        "slo": {"first_s": slo.first_s, "gap_s": slo.gap_s} if slo != NO_SLO else None,
        "output_tokens_per_s": sum(t.completion_tokens for t in timings) / wall_s,
        "cached_tokens": sum(t.cached_tokens for t in timings),
        "time_to_first_token_s": quantiles([t.first_s for t in timings]),
        "inter_token_latency_s": quantiles(gaps),
        "e2e_latency_s": quantiles([t.total_s for t in timings]),
        "requests": [[t.first_s, t.total_s, t.completion_tokens] for t in timings],
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile; empty for no values."""
    if len(values) < 2:
        return {"p50": values[0], "p90": values[0], "p99": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def stream_times(url: str, question: str, terms: dict[str, Any]) -> Iterator[float]:
    """When each piece of one streamed answer arrived (time.perf_counter)."""
    for event in _events(url, question, terms, None):
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            yield time.perf_counter()


def _time(url: str, number: int, load: Load, key: str | None, due_s: float | None = None) -> Timing:
    words = [WORDS[(number * 7 + i * (number + 3)) % len(WORDS)] for i in range(load.prompt_tokens)]
    body = {"max_tokens": load.max_tokens, "ignore_eos": True, "seed": number}
    sent_s = time.perf_counter() if due_s is None else due_s
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    for event in _events(url, f"{number}: {' '.join(words)}", body, key):
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            arrivals.append(time.perf_counter())
        usage = event.get("usage") or usage
    return Timing(
        first_s=(arrivals or [time.perf_counter()])[0] - sent_s,
        gaps_s=tuple(b - a for a, b in zip(arrivals, arrivals[1:], strict=False)),
        total_s=time.perf_counter() - sent_s,
        completion_tokens=usage["completion_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )


def _events(
    url: str, question: str, terms: dict[str, Any], key: str | None
) -> Iterator[dict[str, Any]]:
    """The server-sent events of one chat completion. RuntimeError with the server's sentence."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **terms,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers) as client:
        models = client.get(f"{url}/v1/models")
        if models.status_code != 200:
            raise RuntimeError(f"{models.status_code}: {models.text}")
        model = models.json()["data"][0]["id"]
        path = f"{url}/v1/chat/completions"
        with client.stream("POST", path, json={**body, "model": model}) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    yield event
