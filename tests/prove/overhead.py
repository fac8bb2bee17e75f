"""Proof rows of what HTTP, ingress and actors cost: tokens per second over HTTP against the same
engine in this process, in turns within one run, medians of the ratios."""

import statistics
import time
from collections.abc import Iterator

import torch

from cluster.settings import Settings
from serve import bench, build
from serve.engine.engine import Engine
from tests.live.service import LiveService, service
from tests.prove.engine import sequence
from tests.prove.row import Row

ROUNDS = 5
PROMPT_TOKENS = 64
TARGETS = {1: 0.85, 16: 0.8}
TOKENS = {1: 96, 16: 48}


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured. Both sides compute with every core."""
    settings = Settings.model_validate({"prefill": {"replicas": 0}})
    model = build.load(settings)
    engine, storage = build.engine(settings, model, None)
    threads = torch.get_num_threads()
    with service("prefill.replicas=0", f"decode.threads={threads}") as live:
        for streams, target in TARGETS.items():
            yield _row(live, engine, streams, target)
    storage.close()


def _row(live: LiveService, engine: Engine, streams: int, target: float) -> Row:
    load = bench.Load(streams, streams, PROMPT_TOKENS, TOKENS[streams])
    bench.run(live.url, load)
    _in_process(engine, streams, 0)
    pairs = []
    for turn in range(ROUNDS):
        alone = _in_process(engine, streams, turn + 1)
        pairs.append((bench.run(live.url, load)["output_tokens_per_s"], alone))
    ratio = statistics.median(http / alone for http, alone in pairs)
    http, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
    measured = f"{ratio:.2f} ({http:.1f} and {alone:.1f} tokens/s)"
    name = f"tokens/s over HTTP against the engine, {streams} streams"
    return Row(name, f">= {target:g}", measured, ratio >= target)


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
