"""Measures tile sizes on this machine's GPU and writes the best as entries for configs*.json.

    python -m kernels.triton.tune --out tuned.json --budget-s 120 --only w4_linear

Candidates (tune_cases.py) are compiled in as many processes as there are cores, which fill Triton's
cache on disk, and are then measured one after the other: all of them on an op's first shape, the
quickest on the other ones. The best has the least geometric mean of its times over those. What does
not compile, does not fit the card or gives another result than the shipped tiles is told and left
out. Nothing is tuned when a kernel runs: entries are committed, and compiled and checked ahead of
time like all others.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.triton import launch
from kernels.triton.bench.measure import Contender, copies_for, measure, relative_error
from kernels.triton.configs import Config, tried
from kernels.triton.plan import Plan, run
from kernels.triton.targets import Target, target
from kernels.triton.tune_cases import Tuning, tunings

KEPT = 6  # candidates that are measured on every shape
MOST_ERROR = 0.02  # against what the shipped tiles give
WORST_S = 1e9


class Measured(NamedTuple):
    """A candidate and its median seconds by shape; why it is left out, or ""."""

    config: Config
    seconds: dict[str, float]
    failure: str = ""

    def mean_s(self) -> float:
        if self.failure or not self.seconds:
            return WORST_S
        return math.exp(statistics.fmean(map(math.log, self.seconds.values())))


def compiled(op: str, number: int, config: Config, target_name: str) -> str:
    """Compiles what a candidate launches for a tuning's first shape. What went wrong, or ""."""
    tuning = tunings(op)[number]
    try:
        with tried(tuning.key, config):
            for plan in tuning.shapes[0].build(torch.device("meta"), target(target_name))():
                warm(plan)
    except Exception as failed:  # whatever the compiler raises is an answer
        return _said(failed)
    return ""


def warm(plan: Plan) -> Any:
    """Compiles a plan of tensors without memory as launch.run would launch it."""
    return plan.kernel.warmup(
        **plan.args,
        grid=plan.grid,
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
        enable_fp_fusion=plan.fp_fusion,
    )


def _said(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:160]}"


class Session(NamedTuple):
    """Where is measured, and until when."""

    device: torch.device
    target: Target
    stop_s: float

    def over(self) -> bool:
        return time.perf_counter() > self.stop_s


def measured(
    session: Session, tuning: Tuning, shape_number: int, candidates: Sequence[Measured]
) -> Iterator[Measured]:
    """The candidates with one more shape. Each copy of the tensors is another part of memory."""
    shape = tuning.shapes[shape_number]
    first = shape.build(session.device, session.target)
    every = [first]
    for _ in range(copies_for(shape.read_bytes) - 1):
        every.append(shape.build(session.device, session.target))
    wanted = _result(first())
    for each in candidates:
        if each.failure or session.over():
            yield each
            continue
        with tried(tuning.key, each.config):
            yield _one(shape.name, each, every, wanted)
    if shape.other is not None:
        other = shape.other(session.device)
        taken = measure([Contender("other", lambda _: other(), True)], 3)[0].seconds
        print(f"    {tuning.key} rows={tuning.rows} {shape.name} without tiles: {taken} s")


def _one(
    name: str,
    each: Measured,
    every: list[Callable[[], tuple[Plan, ...]]],
    wanted: torch.Tensor | None,
) -> Measured:
    try:
        plans = [build() for build in every]
        made = _result(plans[0])
        if made is None:
            return each._replace(failure="has no tiles for it")
        off = 0.0 if wanted is None else relative_error(made, wanted)
    except Exception as failed:
        return each._replace(failure=_said(failed))
    if not off < MOST_ERROR:
        return each._replace(failure=f"is wrong by {off:.3g}")

    def call(number: int) -> None:
        for plan in plans[number]:
            run(plan)

    timing = measure([Contender("candidate", call, True, len(plans))], 3)[0]
    if timing.seconds is None:
        return each._replace(failure=timing.failure)
    return each._replace(seconds={**each.seconds, name: timing.seconds})


def _result(plans: tuple[Plan, ...]) -> torch.Tensor | None:
    """What the launches give; None where there are none."""
    for plan in plans:
        run(plan)
    torch.cuda.synchronize()
    if not plans:
        return None
    out = plans[-1].args.get("out", plans[-1].args.get("outs"))
    assert isinstance(out, torch.Tensor)
    return out.clone()


def tuned(session: Session, tuning: Tuning, candidates: list[Measured]) -> list[Measured]:
    """The best first, those without the last shape behind them."""
    found = sorted(measured(session, tuning, 0, candidates), key=Measured.mean_s)
    for number in range(1, len(tuning.shapes)):
        if not session.over():
            found[:KEPT] = measured(session, tuning, number, found[:KEPT])
            torch.cuda.empty_cache()
    return sorted(found, key=lambda each: (-len(each.seconds), each.mean_s()))


def entry(tuning: Tuning, config: Config) -> dict[str, int]:
    """As it stands in configs*.json."""
    made = {"rows": tuning.rows, **config.constants}
    if config.programs:
        made["programs"] = config.programs
    return {**made, "warps": config.num_warps, "stages": config.num_stages}


def main() -> int:
    """0; 1 where there is no GPU."""
    asked = _arguments()
    if not torch.cuda.is_available():
        print("There is no GPU: torch.cuda.is_available() is false.", file=sys.stderr)
        return 1
    begun, device = time.perf_counter(), torch.device("cuda")
    chosen = launch.target_of("tune", torch.empty(1, device=device))
    session = Session(device, chosen, begun + asked.budget_s)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "entries": {}, "measured": []}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 24), mp_context=fresh) as pool:
        waiting = _submitted(pool, asked.only or [""], asked.rows, chosen)
        for tuning, futures in waiting:
            if session.over():
                print(f"{tuning.key} rows={tuning.rows}: no time is left", flush=True)
                continue
            done = _tuned_one(session, tuning, futures, report)
            asked.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
            print(f"  {done} ({time.perf_counter() - begun:.0f} s)", flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
    asked.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


Waiting = list[tuple[Tuning, list[tuple[Config, "Future[str]"]]]]


def _submitted(
    pool: ProcessPoolExecutor, only: Sequence[str], rows: Sequence[int] | None, chosen: Target
) -> Waiting:
    """Candidates that differ in `programs` alone are one to the compiler."""
    waiting: Waiting = []
    for op in only:
        for number, tuning in enumerate(tunings(op)):
            if rows and tuning.rows not in rows:
                continue
            once: dict[str, Future[str]] = {}
            futures = []
            for config in tuning.candidates:
                key = json.dumps([dict(config.constants), config.num_warps, config.num_stages])
                if key not in once:
                    once[key] = pool.submit(compiled, op, number, config, chosen.name)
                futures.append((config, once[key]))
            waiting.append((tuning, futures))
    return waiting


def _tuned_one(
    session: Session,
    tuning: Tuning,
    futures: list[tuple[Config, "Future[str]"]],
    report: dict[str, Any],
) -> str:
    """One line of what came out; the report has the rest."""
    candidates = []
    for config, future in futures:
        left = max(session.stop_s - time.perf_counter(), 0.1)
        try:
            failure = future.result(timeout=left)
        except Exception as failed:
            failure = _said(failed)
        candidates.append(Measured(config, {}, failure))
    try:
        found = tuned(session, tuning, candidates)
    except Exception as failed:
        report["measured"].append({"op": tuning.key, "rows": tuning.rows, "why": _said(failed)})
        return f"{tuning.key} rows={tuning.rows}: {_said(failed)}"
    told = [
        {"entry": entry(tuning, each.config), "us": _us(each), "failure": each.failure}
        for each in found
    ]
    report["measured"].append({"op": tuning.key, "rows": tuning.rows, "candidates": told})
    best = found[0]
    if best.failure or not best.seconds:
        return f"{tuning.key} rows={tuning.rows}: nothing ran; {best.failure}"
    table = report["entries"].setdefault(tuning.key, {}).setdefault(session.target.name, [])
    table.append(entry(tuning, best.config))
    left_out = sum(bool(each.failure) for each in found)
    return f"{tuning.key} {told[0]['entry']} {_us(best)} us; {left_out} of {len(found)} left out"


def _us(each: Measured) -> dict[str, float]:
    return {name: round(seconds * 1e6, 2) for name, seconds in each.seconds.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120)
    parser.add_argument("--only", action="append", help="the beginning of a key; may be repeated")
    parser.add_argument("--rows", type=int, action="append", help="of an entry; may be repeated")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
