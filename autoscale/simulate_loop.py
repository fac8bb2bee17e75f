"""`sanderling simulate --loop`: the control loop over a market and a stream of requests."""

import contextlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoscale.loop.record import FileLog, Head, head_of, make_loop
from autoscale.simulate.loop import LoopReport, World
from autoscale.simulate.loop_plot import draw_loop
from autoscale.simulate.market import Market
from autoscale.simulate.requests import Quantiles, ReplicaSpeed, daily_arrivals
from autoscale.spot.levels import fit, levels_for
from cluster.settings.autoscale import AutoscaleSettings, DecodeScale, RoleScale

POLICIES = ("mixed", "spothedge", "on_demand")
SPEED = ReplicaSpeed(slots=4, prompt_tokens_per_s=2000.0, token_s=0.05, hand_over_s=1.0)
PROMPT_TOKENS, ANSWER_TOKENS = 1000.0, 200.0


@dataclass(frozen=True)
class LoopRun:
    """What was asked for on the command line."""

    policy: str
    over: int
    fit_share: float
    requests: int
    cap: int
    period_s: float
    notice_s: float
    seed: int


def run_loop(market: Market, asked: LoopRun, log: Path | None, plot: Path | None) -> None:
    """Learn from the market's first part, run over the rest; print a table."""
    if asked.policy not in POLICIES:
        raise ValueError(
            f"--policy {asked.policy!r} does not run in the loop; {', '.join(POLICIES)} do"
        )
    fitted = int(asked.fit_share * market.steps)
    if not 2 <= fitted < market.steps - 1:
        raise ValueError(
            f"the fitted part ends at step {fitted}; it takes at least 2 steps and less than the "
            f"trace's {market.steps}"
        )
    scored = market.part(fitted, market.steps)
    span_s = scored.steps * scored.period_s
    speed = _speed(asked, span_s)
    head = _head(market, asked, fitted, speed)
    arrivals = daily_arrivals(asked.requests, span_s, seed=asked.seed)
    logging.getLogger("autoscale.loop").setLevel(logging.ERROR)  # warnings are in the report
    with contextlib.ExitStack() as stack:
        file = FileLog(stack.enter_context(log.open("wb")), head) if log else None
        world = World(scored, make_loop(head), arrivals, speed, notice_s=asked.notice_s, log=file)
        report = world.run()
    console = Console(width=110, highlight=False)
    console.print(loop_table(report, asked.policy))
    console.print(f"a replica: {speed.slots} requests at once, {speed.token_s:.3g} s a token")
    for warning in report.warnings[:5]:
        console.print(f"warned: {warning.about}: {warning.reason}", markup=False)
    if log:
        console.print(f"{report.steps} decisions in {log}; `sanderling plan {log} --explain N`")
    if plot:
        draw_loop(report, asked.policy, plot)
        console.print(f"drawn to {plot}")


def _speed(asked: LoopRun, span_s: float) -> ReplicaSpeed:
    """Replicas so slow that the busiest hour takes about two thirds of the cap."""
    peak_per_s = 1.5 * asked.requests / span_s
    slots = SPEED.slots * asked.cap * 0.6
    token_s = (slots / peak_per_s - PROMPT_TOKENS / SPEED.prompt_tokens_per_s) / ANSWER_TOKENS
    if token_s <= 0:
        raise ValueError(
            f"--requests {asked.requests} is more than {asked.cap} machines serve in that time; "
            "fewer, or a larger --cap, are accepted"
        )
    return ReplicaSpeed(SPEED.slots, SPEED.prompt_tokens_per_s, token_s, SPEED.hand_over_s)


def _head(market: Market, asked: LoopRun, fitted: int, speed: ReplicaSpeed) -> Head:
    takes_s = PROMPT_TOKENS / speed.prompt_tokens_per_s + ANSWER_TOKENS * speed.token_s
    rate = speed.slots * (PROMPT_TOKENS + ANSWER_TOKENS) / takes_s
    settings = AutoscaleSettings(
        policy=asked.policy,  # type: ignore[arg-type]
        history="the market's first part",
        over=asked.over,
        period_s=asked.period_s,
        decode=DecodeScale(floor=1, cap=asked.cap, tokens_per_s=rate),
        prefill=RoleScale(cap=0),
    )
    pools = tuple(offer.name for offer in market.spot)
    history = market.capacity[:fitted]
    levels = levels_for(asked.cap, max(1, int(history.max())))
    regions = tuple(offer.region for offer in market.spot)
    chain = fit(history, pools, regions, levels, market.period_s)
    return head_of(settings, "simulated", pools=pools, chain=chain)


def loop_table(report: LoopReport, policy: str) -> Table:
    """What it came to, one figure a row."""
    table = Table(title=f"control loop, {policy}: {report.steps} decisions")
    table.add_column("what")
    table.add_column("came to", justify="right")
    load, total = report.load, max(report.usd, 1e-9)
    rows = {
        "enough replicas answer, share of steps": f"{report.availability:.3%}",
        "replicas missing, share": f"{report.missing / max(1, report.needed):.3%}",
        "cost, spot": f"${report.spot_usd:.2f} ({report.spot_usd / total:.0%})",
        "cost, on demand": f"${report.on_demand_usd:.2f}",
        "cost, share of the need on demand": f"{report.usd / report.all_on_demand_usd:.3f}",
        "requests served, waiting": f"{load.served}, {load.waiting}",
        "first token, median, P90, P99": _quantiles(load.first_s),
        "between tokens, median, P90, P99": _quantiles(load.token_s),
        "whole answer, median, P90, P99": _quantiles(load.whole_s),
        "requests moved, begun again": f"{load.moved}, {load.restarted}",
        "tokens computed again": f"{load.lost_tokens:.0f}",
        "machines launched, refused, taken": (
            f"{report.launched}, {report.refused}, {report.preempted}"
        ),
        "actions": ", ".join(f"{count} {act}" for act, count in sorted(report.actions.items())),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _quantiles(of: Quantiles) -> str:
    values = [of.at(share) for share in (0.5, 0.9, 0.99)]
    return ", ".join("none" if math.isnan(value) else f"{value:.3g} s" for value in values)
