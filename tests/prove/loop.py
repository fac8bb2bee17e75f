"""Proof rows of the control loop: its properties, a log that repeats, a week of a hundred machines
with the loop in it, memory over the length of a trace, and what the loop costs beside others."""

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from autoscale.loop.record import FileLog, Head, head_of, make_loop, repeat
from autoscale.simulate.loop import LoopReport, World
from autoscale.simulate.market import Market, made_market
from autoscale.simulate.requests import ReplicaSpeed, daily_arrivals
from autoscale.spot.levels import fit, levels_for
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale, RoleScale
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import ROOT, Suite, run

ZONES = ("e1a", "e1b", "e2a", "w1a", "w1b", "w2a")
PROMPT, ANSWER = 1000.0, 200.0
WEEK_STEPS = 2016
SUITES = (
    Suite(
        "bounds, calm on a steady load, ten times the load, any single fault; with mutations",
        ("tests/autoscale/loop/test_loop_properties.py",),
    ),
    Suite(
        "pure steps, order of removal, replace before drain, zero and back, training",
        ("tests/autoscale/loop/test_loop_step.py",),
    ),
    Suite(
        "a log with losses, hangs and lost answers repeats byte for byte; changes are noticed",
        ("tests/autoscale/loop/test_loop_log.py",),
    ),
    Suite(
        "the simulated provider keeps the contract; the command and its files",
        ("tests/autoscale/loop/test_loop_simulated.py",),
    ),
)


def rows() -> Iterator[Row]:
    """The table of the loop."""
    for suite in SUITES:
        yield from attempt(suite.shows, partial(run, suite))
    yield from attempt("replay", replayed)
    yield from attempt("a week", week)
    yield from attempt("memory", memory)
    yield from attempt("policies", beside_others)


def world(
    policy: str, steps: int, requests: int, *, cap: int, period_s: float = 60.0, log: bool = False
) -> tuple[World, io.BytesIO]:
    """A loop over a made market whose history is another draw of the same kind; the busiest hour
    takes about two thirds of the cap."""
    market = made_market(steps, ZONES, depth=max(4, cap // 2), seed=1)
    history = made_market(WEEK_STEPS, ZONES, depth=max(4, cap // 2), seed=2)
    span_s = steps * market.period_s
    takes_s = 4 * cap * 0.6 * span_s / (1.5 * requests)
    speed = ReplicaSpeed(4, 2000.0, (takes_s - PROMPT / 2000.0) / ANSWER, 1.0)
    head = _head(policy, market, history, cap, 4 * (PROMPT + ANSWER) / takes_s, period_s)
    file = io.BytesIO()
    kept = FileLog(file, head) if log else None
    arrivals = daily_arrivals(requests, span_s, seed=1)
    return World(market, make_loop(head), arrivals, speed, log=kept), file


def _head(
    policy: str, market: Market, history: Market, cap: int, rate: float, period_s: float
) -> Head:
    settings = AutoscaleSettings(
        policy=policy,  # type: ignore[arg-type]
        history="made",
        period_s=period_s,
        decode=DecodeScale(floor=1, cap=cap, tokens_per_s=rate),
        prefill=RoleScale(cap=0),
    )
    pools = tuple(offer.name for offer in market.spot)
    regions = tuple(offer.region for offer in market.spot)
    levels = levels_for(cap, int(history.capacity.max()))
    chain = fit(history.capacity, pools, regions, levels, market.period_s)
    return head_of(settings, "proof", pools=pools, chain=chain)


def replayed() -> Row:
    """A simulated day, logged and decided again from its log."""
    made, file = world("mixed", 288, 20_000, cap=16, log=True)
    made.run()
    lines = file.getvalue().splitlines(keepends=True)
    same = [one.same for one in repeat(lines)]
    other = [*lines[:200], lines[201], *lines[202:]]
    noticed = sum(not one.same for one in repeat(other))
    return Row(
        "a day's log decided again; with one line left out",
        "every line byte for byte; differs",
        f"{sum(same)} of {len(same)}; {noticed} lines differ",
        all(same) and len(same) > 1000 and noticed > 0,
    )


def week() -> Row:
    """A hundred machines, a million requests, seven days, a decision a minute."""
    made, _ = world("mixed", WEEK_STEPS, 1_000_000, cap=100)
    started_s, cpu_s = time.monotonic(), time.process_time()
    report = made.run()
    took_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    load = report.load
    return Row(
        "a week of 100 machines and 1e6 requests with the loop in it",
        "<= 60 s of one core",
        f"{cpu_s:.0f} s ({took_s:.0f} s beside others), {report.steps} decisions; {_told(report)}; "
        f"{load.served} served, {load.waiting} waiting, first token P99 "
        f"{load.first_s.at(0.99):.1f} s, {load.moved} moved, {load.restarted} begun again, "
        f"{load.lost_tokens:.0f} tokens again",
        cpu_s <= 60 and load.served > 990_000,
    )


def _told(report: LoopReport) -> str:
    return f"available {report.availability:.4f} at {report.usd / report.all_on_demand_usd:.3f}"


def memory() -> Row:
    """Peak memory of a process that simulates two days, and of one that simulates eight."""
    peaks = [_peak_mib(days) for days in (2, 8)]
    return Row(
        "memory over the length of a trace (8 days against 2)",
        "<= 8 MiB more",
        f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB",
        peaks[1] - peaks[0] <= 8,
    )


def _peak_mib(days: int) -> float:
    code = (
        "import resource; from tests.prove.loop import world; "
        f"world('spothedge', {288 * days}, {10_000 * days}, cap=16)[0].run(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    return float(done.stdout.strip().splitlines()[-1])


def beside_others() -> Iterator[Row]:
    """The same loop, market and requests under each policy."""
    reports = {}
    for policy in ("mixed", "spothedge", "on_demand"):
        made, _ = world(policy, 576, 40_000, cap=16)
        reports[policy] = made.run()
    shown = ", ".join(f"{name} {_told(report)}" for name, report in reports.items())
    mixed, hedge, plain = (reports[name] for name in ("mixed", "spothedge", "on_demand"))
    yield Row(
        "two days under the loop, by policy",
        "mixed cheaper than both, missing <= 1 % of replicas",
        f"{shown}; missing {mixed.missing / mixed.needed:.3%}, {hedge.missing / hedge.needed:.3%}, "
        f"{plain.missing / plain.needed:.3%}",
        mixed.usd < min(hedge.usd, plain.usd) and mixed.missing <= 0.01 * mixed.needed,
    )
