"""/v1/embeddings: OpenAI's request and answer, and the embeddings of all inputs from the service.

Each input is a request of its own at the service, so it is routed, queued, batched and resumed as
any other; a few are under way at once, so that a long list does not fill the queue. Called by
http.py.
"""

import asyncio
import base64
from contextlib import aclosing
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import PlainValidator, StringConstraints

from serve.engine.sequence import Delta, Request
from serve.errors import RequestError, mistyped
from serve.observe import RequestMetrics
from serve.openai import Label, Tokens, Wire
from serve.service import Service

MAX_INPUTS = 2048  # as OpenAI's
AT_ONCE = 16


def _inputs(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text, one list of token ids, or a list of either kind."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise mistyped("should be a string, a list of strings, or token ids")
    if value and all(type(token) is int for token in value):
        return (tuple(value),)
    if not 1 <= len(value) <= MAX_INPUTS:
        raise ValueError(f"has {len(value)} inputs; 1 to {MAX_INPUTS} are accepted")
    return tuple(_one(item) for item in value)


def _one(item: Any) -> str | tuple[int, ...]:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and all(type(token) is int for token in item):
        return tuple(item)
    raise mistyped("should be a string, a list of strings, or token ids")


class EmbeddingRequest(Wire):
    """dimensions: keep so many of the first, scaled to length 1 again; 0 (not sent) keeps all."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    input: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_inputs)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Tokens = 0
    user: Label | None = None


async def embed_all(
    service: Service, requests: list[Request], measured: list[RequestMetrics]
) -> list[tuple[float, ...]]:
    """The embedding of each request, in order; one that fails ends them all with its error."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(request: Request, metrics: RequestMetrics) -> tuple[float, ...]:
        async with slots:
            delta = await _last(service, request)
        if delta.finish != "stop":
            metrics.ended("error")
            text = delta.error or "The service ended the request without an embedding."
            raise RequestError(500, "server_error", None, text, "internal_error")
        metrics.delta(0)
        metrics.ended("stop")
        return delta.embedding

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*pair)) for pair in zip(requests, measured, strict=True)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for metrics in measured:
            metrics.closed()
    return [task.result() for task in tasks]


async def _last(service: Service, request: Request) -> Delta:
    async with aclosing(service.generate(request)) as deltas:
        return [delta async for delta in deltas][-1]


def answer(
    parsed: EmbeddingRequest, requests: list[Request], vectors: list[tuple[float, ...]]
) -> dict[str, Any]:
    """OpenAI's object; base64 is of little-endian float32."""
    tokens = sum(len(request.prompt) for request in requests)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, parsed)}
        for index, vector in enumerate(shortened(vectors, parsed.dimensions))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": parsed.model, "usage": usage}


def shortened(vectors: list[tuple[float, ...]], dimensions: int) -> list[tuple[float, ...]]:
    """The first `dimensions` of each at length 1; 0 leaves them as they are."""
    if not dimensions:
        return vectors
    cut = np.array([vector[:dimensions] for vector in vectors])
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return [tuple(row) for row in (cut / np.maximum(lengths, 1e-12)).tolist()]


def _written(vector: tuple[float, ...], parsed: EmbeddingRequest) -> str | tuple[float, ...]:
    if parsed.encoding_format != "base64":
        return vector
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
