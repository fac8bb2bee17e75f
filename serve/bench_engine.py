"""The same load on an engine in this process: what HTTP, ingress and actors can be compared with.

Called by `sanderling bench engine`.
"""

import time
from typing import Any

from cluster.settings import Settings
from serve import build
from serve.bench import NO_SLO, Load, Timing, report
from serve.engine.engine import Engine
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.prefix import CacheKey


def run_engine(settings: Settings, load: Load) -> dict[str, Any]:
    """The report of `serve.bench`, with all requests there at once. No prompt shares a prefix."""
    model = build.load(settings)
    engine, storage = build.engine(settings, model, None)
    try:
        step(engine, Load(1, 1, 8, 4), model.decoder.config.vocab)  # the first one warms up
        started_s = time.perf_counter()
        timings = step(engine, load, model.decoder.config.vocab)
        wall_s = time.perf_counter() - started_s
    finally:
        storage.close()
    return {"load": load._asdict(), **report(timings, wall_s, NO_SLO)}


def step(engine: Engine, load: Load, vocab: int) -> list[Timing]:
    """Run the load to its end; when each token came."""
    arrivals: dict[str, list[float]] = {}
    started_s = time.perf_counter()
    for number in range(load.requests):
        name = f"{load.requests}-{number}"
        prompt = tuple((101 + 37 * i + 997 * number) % vocab for i in range(load.prompt_tokens))
        limits = Limits(load.max_tokens, ignore_eos=True)
        key = CacheKey(name, "", "")
        engine.add(Sequence(Request(name, prompt, Sampling(temperature=0.0), limits, key)))
        arrivals[name] = []
    while engine.has_work:
        for output in engine.step():
            arrivals[output.request_id].append(time.perf_counter())
    return [_timing(times, started_s) for times in arrivals.values()]


def _timing(times: list[float], started_s: float) -> Timing:
    gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
    return Timing(times[0] - started_s, gaps, times[-1] - started_s, len(times), 0)
