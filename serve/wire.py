"""What crosses between a decode replica and an ingress: one message per engine step and ingress.

A message holds the outputs of every sequence of that ingress that the step touched, as JSON (never
pickle). Called by decode.py to write and ingress.py to read.
"""

import json
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any, NamedTuple, cast

from serve.engine.sequence import Delta, Finish, Output, Parked, TokenLogprob


class Moved(NamedTuple):
    """The replica will not go on with this request; whoever keeps its record resumes elsewhere.

    parked: where the KV it had waits for the next replica; None when that is gone.
    """

    request_id: str
    parked: Parked | None = None


def failed(request_id: str, index: int, error: Exception) -> Output:
    """The last output of a request that an unexpected error ended."""
    sentence = f"The request failed on its replica: {error}"
    return Output(request_id, index, Delta((), "error", error=sentence))


def pack(items: Iterable[Output | Moved]) -> bytes:
    """Outputs and departures to one message."""
    return json.dumps([_row(item) for item in items], separators=(",", ":")).encode()


def unpack(message: bytes) -> list[Output | Moved]:
    """One message to what was packed."""
    return [_item(row) for row in json.loads(message)]


def _row(item: Output | Moved) -> list[Any]:
    if isinstance(item, Moved):
        return [item.request_id, item.parked and astuple(item.parked)]
    d = item.delta
    reported = [[[entry.logprob, entry.top] for entry in each] for each in (d.logprobs, d.scores)]
    terms = [d.finish, d.stop, d.cached_tokens, d.error, *reported, d.embedding]
    return [item.request_id, item.index, d.token_ids, *terms]


def _item(row: list[Any]) -> Output | Moved:
    if len(row) == 2:
        return Moved(row[0], row[1] and Parked(*row[1]))
    request_id, index, ids, finish, stop, cached, error, reported, scored, embedding = row
    logprobs, scores = _logprobs(reported), _logprobs(scored)
    end = cast(Finish | None, finish)
    delta = Delta(tuple(ids), end, stop, cached, error, logprobs, tuple(embedding), scores)
    return Output(request_id, index, delta)


def _logprobs(rows: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(logprob, tuple((token, value) for token, value in top))
        for logprob, top in rows
    )
