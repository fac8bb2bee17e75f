"""Proof rows of what HTTP, ingress, hand-off and actors cost: tokens per second over HTTP against
the same engine in this process, in turns within one run, medians of the ratios.

Once as `sanderling up` deploys by default (a prefill and a decode replica share the cores), and
once with every core in one decode replica, where each wake-up of another process takes a core from
the computation.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator

import httpx
import torch

from cluster.settings import Settings
from serve import build
from serve.actors import compute_threads
from serve.engine.engine import Engine
from tests.live.service import MODEL, LiveService, service
from tests.prove.engine import sequence
from tests.prove.row import Row

ROUNDS = 5
PROMPT_TOKENS = 64
TARGETS = {1: 0.85, 16: 0.8}
TOKENS = {1: 96, 16: 48}


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured. Both sides compute with as many threads."""
    settings = Settings()
    model = build.load(settings)
    engine, storage = build.engine(settings, model, None)
    every = torch.get_num_threads()
    alone = ("prefill.replicas=0", f"decode.threads={every}")
    for flags, threads in (((), compute_threads(settings, settings.decode)), (alone, every)):
        torch.set_num_threads(threads)
        with service(*flags) as live:
            for streams, target in TARGETS.items():
                yield _row(live, engine, streams, target, threads)
    torch.set_num_threads(every)
    storage.close()


def _row(live: LiveService, engine: Engine, streams: int, target: float, threads: int) -> Row:
    first = 100 * streams  # no prompt twice: nothing is found in the cache
    _over_http(live, streams, first)
    _in_process(engine, streams, first)
    pairs = []
    for turn in range(ROUNDS):
        alone = _in_process(engine, streams, first + turn + 1)
        pairs.append((_over_http(live, streams, first + turn + 1), alone))
    ratio = statistics.median(http / alone for http, alone in pairs)
    http, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
    measured = f"{ratio:.2f} ({http:.1f} and {alone:.1f} tokens/s)"
    name = f"tokens/s over HTTP against the engine, {streams} streams, {threads} threads"
    return Row(name, f">= {target:g}", measured, ratio >= target)


def _over_http(live: LiveService, streams: int, turn: int) -> float:
    """The same prompts, as token ids, streamed over kept connections."""
    return asyncio.run(_streams(live, streams, turn))


async def _streams(live: LiveService, streams: int, turn: int) -> float:
    async with httpx.AsyncClient(timeout=300) as client:
        started_s = time.perf_counter()
        answers = (_stream(client, live, TOKENS[streams], turn, n) for n in range(streams))
        return sum(await asyncio.gather(*answers)) / (time.perf_counter() - started_s)


async def _stream(
    client: httpx.AsyncClient, live: LiveService, tokens: int, turn: int, number: int
) -> int:
    prompt = sequence("", PROMPT_TOKENS, tokens, offset=1009 * turn + 13 * number).request.prompt
    body = {
        **{"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0},
        **{"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}},
    }
    usage: dict[str, int] = {}
    url = f"{live.url}/v1/completions"
    async with client.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    return usage["completion_tokens"]


def _in_process(engine: Engine, streams: int, turn: int) -> float:
    """Tokens per second of as many sequences of the same lengths, all there at once."""
    for n in range(streams):
        name = f"{streams}-{turn}-{n}"
        engine.add(sequence(name, PROMPT_TOKENS, TOKENS[streams], offset=1009 * turn + 13 * n))
    started_s = time.perf_counter()
    tokens = 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - started_s)
