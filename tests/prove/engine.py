"""Proof rows of the engine on the default model: batching by iteration, and prompts that stall
nobody. Times are ratios of medians taken in turns within one run."""

import math
import statistics
import time
from collections.abc import Iterator

from cluster.settings import Settings
from serve import build
from serve.engine.cost import StepCost
from serve.engine.engine import Engine
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.prefix import CacheKey
from tests.prove.row import Row

DECODES = 8
LONG_TOKENS = 2000
ROUNDS = 3


def rows(model: build.Model | None = None) -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    model = model or build.load(Settings())
    yield leaves_at_once(model)
    yield starts_at_once(model)
    yield from stalls(model)


def make_engine(model: build.Model, budget_tokens: int = 256, chunked: bool = True) -> Engine:
    """An engine of the default settings but for its budget; unchunked means no budget at all."""
    budget = budget_tokens if chunked else 1 << 20
    settings = Settings.model_validate({"engine": {"budget_tokens": budget}})
    engine, _ = build.engine(settings, model, None)
    if not chunked:
        engine.scheduler.cost = StepCost(math.inf)
    return engine


def sequence(name: str, prompt_tokens: int, max_tokens: int, offset: int = 0) -> Sequence:
    """A greedy sequence over made-up tokens that goes on to its last token."""
    prompt = tuple(100 + (offset + 37 * i) % 40_000 for i in range(prompt_tokens))
    limits = Limits(max_tokens, ignore_eos=True)
    key = CacheKey(name, "", "")  # nobody shares a prefix here
    return Sequence(Request(name, prompt, Sampling(temperature=0.0), limits, key))


def leaves_at_once(model: build.Model) -> Row:
    """The step that makes the last token of a request also takes it out and frees its pages."""
    engine = make_engine(model)
    engine.add(sequence("short", 10, 3))
    engine.add(sequence("long", 10, 9))
    late = 0
    while engine.has_work:
        outputs = engine.step()
        engine.check()
        ended = [o.request_id for o in outputs if o.delta.finish]
        late += sum(request_id in engine.sequences for request_id in ended)
    return Row("a finished request leaves", "in its step", f"{late} of 2 later", late == 0)


def starts_at_once(model: build.Model) -> Row:
    """A request that arrives among running ones is computed in the very next step."""
    engine = make_engine(model)
    for n in range(DECODES):
        engine.add(sequence(f"running {n}", 12, 40, n))
    for _ in range(5):
        engine.step()
    engine.add(sequence("late", 20, 4))
    outputs = engine.step()
    waited = 0 if any(o.request_id == "late" for o in outputs) else 1
    return Row("a late arrival starts", "within 1 step", f"{waited} steps waited", waited == 0)


def stalls(model: build.Model) -> Iterator[Row]:
    """The largest gap between two tokens of the running ones while a long prompt arrives, against
    the time of a step that the budget fills with a prompt's beginning."""
    chunked, whole = make_engine(model), make_engine(model, chunked=False)
    for engine in (chunked, whole):
        for n in range(DECODES):
            engine.add(sequence(f"running {n}", 16, 2000, n))
        for _ in range(3):
            engine.step()
    steps, gaps, unchunked = [], [], []
    for turn in range(ROUNDS):
        budget = chunked.scheduler.budget_tokens
        steps.append(_largest_gap(chunked, sequence(f"full {turn}", budget, 1, turn)))
        gaps.append(_largest_gap(chunked, sequence(f"long {turn}", LONG_TOKENS, 1, turn)))
        unchunked.append(_largest_gap(whole, sequence(f"long {turn}", LONG_TOKENS, 1, turn)))
    step = statistics.median(steps)
    ratio, worst = statistics.median(gaps) / step, statistics.median(unchunked) / step
    what = f"{LONG_TOKENS}-token prompt among {DECODES} decodes"
    yield Row(f"{what}: largest gap", "<= 1.3 budget steps", f"{ratio:.2f}", ratio <= 1.3)
    yield Row(f"{what}, unchunked", ">= 4 budget steps", f"{worst:.2f}", worst >= 4)


def _largest_gap(engine: Engine, arrival: Sequence) -> float:
    """Seconds of the longest step from an arrival to its first token; decodes emit in each."""
    engine.add(arrival)
    longest, here = 0.0, True
    while here:
        started = time.perf_counter()
        outputs = engine.step()
        longest = max(longest, time.perf_counter() - started)
        assert sum(o.request_id.startswith("running") for o in outputs) == DECODES
        here = arrival.request_id in engine.sequences
    return longest
