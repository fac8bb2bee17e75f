"""When requests of a load arrive and how long they are: a Poisson process, or a recorded trace.

Pure and seeded. Called by `sanderling bench serve`.
"""

import csv
import json
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request: when it arrives, seconds from the beginning, and its lengths in tokens."""

    at_s: float
    prompt_tokens: int
    max_tokens: int


def poisson(
    requests: int, rate_per_s: float, prompt_tokens: int, max_tokens: int, seed: int
) -> list[Arrival]:
    """Independent exponential gaps of mean 1 / rate_per_s; the first request comes after one."""
    chance, now_s, made = random.Random(seed), 0.0, []
    for _ in range(requests):
        now_s += chance.expovariate(rate_per_s)
        made.append(Arrival(now_s, prompt_tokens, max_tokens))
    return made


def trace(path: Path, requests: int, speed: float = 1.0) -> list[Arrival]:
    """The first `requests` of a file, `speed` times as fast as recorded.

    .csv: TIMESTAMP, ContextTokens, GeneratedTokens (Azure's LLM traces). .jsonl: timestamp in ms,
    input_length, output_length (Mooncake's). ValueError with the line for anything else.
    """
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ValueError(
            f"{path} is no trace that is known: .csv (Azure) and .jsonl (Mooncake) are"
        )
    made: list[Arrival] = []
    with path.open(encoding="utf-8") as file:
        rows = readers[path.suffix](file)
        for number in range(1, requests + 1):
            try:
                made.append(next(rows))
            except StopIteration:
                break
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}, request {number}: {error!r} is not accepted") from error
    if not made:
        raise ValueError(f"{path} holds no request")
    first_s = made[0].at_s
    return [arrival._replace(at_s=(arrival.at_s - first_s) / speed) for arrival in made]


def _azure(lines: Iterator[str]) -> Iterator[Arrival]:
    for row in csv.DictReader(lines):
        stamp = row["TIMESTAMP"][:26]  # seven digits of a second are one too many
        at_s = datetime.fromisoformat(stamp).timestamp()
        yield _arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(lines: Iterator[str]) -> Iterator[Arrival]:
    for line in lines:
        row = json.loads(line)
        yield _arrival(row["timestamp"] / 1e3, row["input_length"], row["output_length"])


def _arrival(at_s: float, prompt_tokens: int, answer_tokens: int) -> Arrival:
    if prompt_tokens < 0 or answer_tokens < 0:
        raise ValueError(f"{prompt_tokens} and {answer_tokens} tokens")
    return Arrival(at_s, max(prompt_tokens, 1), max(answer_tokens, 1))
