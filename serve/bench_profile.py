"""Measures how long steps of the engine take here, as a table that `sanderling plan` reads.

Called by `sanderling bench profile`. Prompts alone give the prefill rows; decode rows are steps in
which every sequence makes one token. Medians of rounds, in turns, so that a busy moment of the
machine does not fall on one row alone.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cluster.settings import Settings
from serve import build
from serve.engine.engine import Engine
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.prefix import CacheKey

PROMPTS = (16, 64, 256, 512)
SEQUENCES = (1, 2, 4, 8, 16)
CONTEXTS = (64, 512)
STEPS = 6  # decode steps timed in a round
LONGEST = 64  # tokens that an early sequence makes while the prompts of others are computed


class Prefill(NamedTuple):
    """One prompt, alone."""

    tokens: int


class Decode(NamedTuple):
    """So many sequences, each with so much context."""

    sequences: int
    context_tokens: int


Case = Prefill | Decode
Clock = Callable[[], float]


class Measured(NamedTuple):
    """Median seconds of every case, and what was measured."""

    seconds: dict[Case, float]
    model: str
    kv_tokens: int
    threads: int


def measure(settings: Settings, rounds: int, clock: Clock = time.perf_counter) -> Measured:
    """All cases that fit the engine's pages and running sequences, `rounds` times in turns."""
    import torch

    model = build.load(settings)
    engine, storage = build.engine(settings, model, None)
    vocab = model.decoder.config.vocab
    try:
        cases = fitting(settings)
        times: dict[Case, list[float]] = {case: [] for case in cases}
        run_case(engine, Prefill(PROMPTS[0]), vocab, "warm", clock)
        for number in range(rounds):
            for case in cases:
                times[case].append(run_case(engine, case, vocab, f"{number}", clock))
    finally:
        storage.close()
    medians = {case: statistics.median(each) for case, each in times.items()}
    return Measured(medians, settings.model, settings.engine.kv_tokens, torch.get_num_threads())


def fitting(settings: Settings) -> list[Case]:
    """The cases for which the engine has pages and places."""
    room, most = settings.engine.kv_tokens, settings.engine.max_running
    cases: list[Case] = [Prefill(tokens) for tokens in PROMPTS if tokens + 1 <= room]
    for context in CONTEXTS:
        for sequences in SEQUENCES:
            page = settings.engine.page_tokens
            if sequences <= most and sequences * (context + LONGEST + page) <= room:
                cases.append(Decode(sequences, context))
    return cases


def run_case(engine: Engine, case: Case, vocab: int, name: str, clock: Clock) -> float:
    """Seconds of a prompt, or of one decode step (median); the engine is empty before and after."""
    if isinstance(case, Prefill):
        _add(engine, case.tokens, 1, vocab, f"{name}-p{case.tokens}")
        started_s = clock()
        while engine.has_work:
            engine.step()
        return clock() - started_s
    for number in range(case.sequences):
        label = f"{name}-d{case.sequences}-{case.context_tokens}-{number}"
        _add(engine, case.context_tokens, LONGEST, vocab, label)
    names = list(engine.sequences)
    begun: set[str] = set()
    steps_s: list[float] = []
    while engine.has_work and len(steps_s) < STEPS:
        all_decode = len(begun) == case.sequences
        started_s = clock()
        outputs = engine.step()
        if all_decode and len(outputs) == case.sequences:
            steps_s.append(clock() - started_s)
        begun.update(output.request_id for output in outputs)
    for each in names:
        engine.abort(each)
    assert steps_s, f"{case} never ran with all sequences in decode"
    return statistics.median(steps_s)


def _add(engine: Engine, prompt_tokens: int, max_tokens: int, vocab: int, name: str) -> None:
    """One sequence that shares no prefix with any other."""
    prompt = tuple((101 + 37 * place) % vocab for place in range(prompt_tokens))
    limits = Limits(max_tokens, ignore_eos=True)
    key = CacheKey(name, "", "")
    engine.add(Sequence(Request(name, prompt, Sampling(temperature=0.0), limits, key)))


def to_toml(measured: Measured, kind: str, today: datetime.date) -> str:
    """The file that `[profile] from = "measured"` reads."""
    source = f"measured on {processor()}, {measured.threads} threads, {today.isoformat()}"
    lines = [
        "# Written by `sanderling bench profile`: seconds of the engine's steps.",
        f'source = "{source}, by sanderling bench profile"',
        f'model = "{measured.model}"',
        "",
        "[[replica]]",
        f'kind = "{kind}"',
        f"kv_tokens = {measured.kv_tokens}",
        "prefill = [",
    ]
    decodes = []
    for case, seconds in measured.seconds.items():
        if isinstance(case, Prefill):
            lines.append(f"  {{ tokens = {case.tokens}, seconds = {seconds:.6f} }},")
        else:
            where = f"sequences = {case.sequences}, context_tokens = {case.context_tokens}"
            decodes.append(f"  {{ {where}, seconds = {seconds:.6f} }},")
    return "\n".join([*lines, "]", "decode = [", *decodes, "]", ""])


def processor() -> str:
    """The processor's name, without what would break a TOML text."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores of {name}".replace('"', "'").replace("\\", "/")
