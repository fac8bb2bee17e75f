"""What a measured engine's process says and hears: one line of JSON for each, and never at once.

The process loads its engine, writes `{"ready": VERSION}`, and then answers a Cell a line with
`{"figures": {WAY: tokens per second}}` or `{"error": SENTENCE}` until its input ends. While it
waits it blocks in a read, so that it takes no time from another that is measured. Only the standard
library is imported here: these processes run in the environments of their engines. Called by
tests/peers/inprocess/run_*.py; the other side is children.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TextIO

THREADS = 2


class Cell(NamedTuple):
    """What is measured: `batch` sequences of prompt_tokens, each continued by new_tokens.

    new_tokens 0: the prefill, from the prompts to the first tokens. turn: no two turns have a
    prompt in common, so that no prefix cache helps.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    turn: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids, made up but of no special token."""
        first = 7919 * self.turn
        return [
            [1000 + (first + 37 * i + 997 * n) % 40_000 for i in range(self.prompt_tokens)]
            for n in range(self.batch)
        ]


Measure = Callable[[Cell], Mapping[str, float]]


class Mark(NamedTuple):
    """When a step ended, and how many tokens each sequence had made by then."""

    at_s: float
    tokens: tuple[int, ...]


def decode_rate(marks: list[Mark], new_tokens: int) -> float:
    """Tokens per second while all sequences decode: from the step after which each has one, to the
    first after which one is done. ValueError when there is no step between."""
    whole = [mark for mark in marks if min(mark.tokens) > 0]
    until = next((n for n, mark in enumerate(whole) if max(mark.tokens) >= new_tokens), -1)
    if until < 1:
        raise ValueError(
            f"no step decodes all {len(marks[-1].tokens) if marks else 0} sequences together: "
            f"{new_tokens} new tokens each are too few"
        )
    first, last = whole[0], whole[until]
    return (sum(last.tokens) - sum(first.tokens)) / (last.at_s - first.at_s)


def stepped(cell: Cell, step: Callable[[list[int]], bool]) -> float:
    """Tokens per second of a cell on an engine that goes by steps, its sequences queued already.

    step: computes one and raises the counts of tokens made, one for each sequence; False when
    nothing is left to do.
    """
    counts = [0] * cell.batch
    marks = []
    started_s = time.perf_counter()
    while step(counts):
        marks.append(Mark(time.perf_counter(), tuple(counts)))
    if cell.new_tokens:
        return decode_rate(marks, cell.new_tokens)
    done_s = next(mark.at_s for mark in marks if min(mark.tokens) > 0)
    return cell.batch * cell.prompt_tokens / (done_s - started_s)


def serve(load: Callable[[], tuple[str, Measure]]) -> None:
    """Be the process: load (giving a version and what measures), then answer until input ends.

    Whatever a library prints goes to standard error; the lines alone go where output went.
    """
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        try:
            version, measure = load()
        except Exception as error:  # the other side says which engine it was
            _say(lines, {"error": _sentence(error)})
            return
        _say(lines, {"ready": version})
        for line in sys.stdin:
            _say(lines, answer(measure, line))


def answer(measure: Measure, line: str) -> dict[str, object]:
    """The answer to one line. An engine's own failure is an answer too."""
    try:
        return {"figures": dict(measure(Cell(**json.loads(line))))}
    except Exception as error:  # as above
        return {"error": _sentence(error)}


def _say(lines: TextIO, what: Mapping[str, object]) -> None:
    lines.write(json.dumps(what) + "\n")
    lines.flush()


def _sentence(error: Exception) -> str:
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[-1][:200]}"
