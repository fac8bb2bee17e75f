"""Proof rows of the spot market: recorded traces (learnt on the first 40 %, scored on the rest),
serving on SpotServe's traces, Bamboo's rows, and a week of a hundred machines."""

import json
import resource
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from autoscale.simulate.bound import bound, bound_without_starts
from autoscale.simulate.market import made_market
from autoscale.simulate.plans import LayerTimes, read_layer_times
from autoscale.simulate.replay import Report, replay
from autoscale.simulate.requests import ReplicaSpeed, RequestLoad, daily_arrivals
from autoscale.simulate.spotserve import Change, Serving, Site
from autoscale.simulate.study import Study, duel
from autoscale.spot.belief import SpotRisk
from autoscale.spot.levels import fit, levels_for
from autoscale.spot.mixed import MixedPolicy
from tests.autoscale.spot_markets import DATA, TRACES, recorded
from tests.autoscale.test_simulate_bamboo import PUBLISHED, mean_row
from tests.prove.attempt import attempt
from tests.prove.row import Row
from tests.prove.suites import Suite, run

NEED = 4
PRICES = {
    "aws1": (6.0, 12.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0),
    "aws3": (3.0, 170.0, 300.0),
}
NAMES = {"aws1": "3 zones of up to 4 machines", "aws3": "9 zones"}
SUITES = (
    Suite(
        "baselines: SpotHedge written twice, even spread and single pool do not insist",
        ("tests/autoscale/test_spot_baselines.py",),
    ),
    Suite(
        "risk and choice: beliefs of all paths, walks, the cheapest of all combinations",
        ("tests/autoscale/test_spot_risk.py", "tests/autoscale/test_spot_mixed.py"),
    ),
    Suite(
        "the bound is that of every schedule; requests are those of a plain queue",
        ("tests/autoscale/test_simulate_bound.py", "tests/autoscale/test_simulate_requests.py"),
    ),
    Suite("jobs with deadlines are never late", ("tests/autoscale/test_spot_deadline.py",)),
)


class Curves(NamedTuple):
    """Both policies over the scored part of one trace, and the bound there."""

    hedge: list[Report]
    ours: list[Report]
    least: float
    least_without_starts: float


def rows() -> Iterator[Row]:
    """The table of issue's first part."""
    if not all(folder.is_dir() for folder in TRACES.values()):
        yield Row("recorded traces", "present", f"absent: {TRACES}", False)
        return
    curves = {name: measured(name) for name in TRACES}
    for name, made in curves.items():
        yield from attempt(name, partial(against, name, made))
    yield from attempt("both traces", lambda: together(curves))
    yield from attempt("SpotServe", serving)
    yield from attempt("Bamboo", bamboo)
    yield from attempt("a week", week)
    for suite in SUITES:
        yield from attempt(suite.shows, partial(run, suite))


def measured(name: str) -> Curves:
    market = recorded(name)
    study = Study(market, NEED, int(0.4 * market.steps))
    scored = market.part(study.fitted, market.steps)
    return Curves(
        [study.hedge(over) for over in range(5)],
        [study.mixed(MixedPolicy(price)) for price in PRICES[name]],
        bound(scored, NEED),
        bound_without_starts(scored, NEED),
    )


def against(name: str, curves: Curves) -> Iterator[Row]:
    """Each point of SpotHedge against our curve, and the refusals."""
    floor = f"all-knowing {curves.least:.3f}, without starts {curves.least_without_starts:.3f}"
    for over, rival in enumerate(curves.hedge):
        found = duel(rival, curves.ours)
        yield Row(
            f"{NAMES[name]}: SpotHedge +{over} ({point(rival)})",
            "cheaper at its availability, more available at its cost",
            f"{point(found.cheaper)}; {point(found.better)} ({floor})",
            found.wins,
        )
    most, fewest = max(r.refused for r in curves.ours), min(r.refused for r in curves.hedge)
    yield Row(
        f"{NAMES[name]}: refused launches",
        "<= 1/5 of SpotHedge's at its availability and better",
        f"{_refused(curves)}; ours anywhere at most {most}, SpotHedge at least {fewest}",
        _few(curves),
    )


def point(report: Report | None) -> str:
    return "none" if report is None else f"{report.availability:.4f} at {report.cost:.3f}"


def _pairs(curves: Curves) -> list[tuple[Report, Report]]:
    """SpotHedge's points and our cheapest as available as they."""
    found = [(rival, duel(rival, curves.ours).cheaper) for rival in curves.hedge]
    return [(rival, ours) for rival, ours in found if ours is not None]


def _few(curves: Curves) -> bool:
    pairs = _pairs(curves)
    return len(pairs) == len(curves.hedge) and all(5 * o.refused <= r.refused for r, o in pairs)


def _refused(curves: Curves) -> str:
    return ", ".join(f"{ours.refused} of {rival.refused}" for rival, ours in _pairs(curves))


def together(curves: dict[str, Curves]) -> Iterator[Row]:
    """Means over both traces."""
    rivals = [made.hedge[2] for made in curves.values()]
    ours = [duel(made.hedge[2], made.ours).cheaper for made in curves.values()]
    cost = np.mean([report.cost if report else np.inf for report in ours])
    yield Row(
        "mean cost at SpotHedge +2's availability",
        "<= 0.42",
        f"{cost:.3f} (SpotHedge {np.mean([rival.cost for rival in rivals]):.3f})",
        bool(cost <= 0.42),
    )
    high = [
        min((r.cost for r in made.ours if r.availability >= 0.999), default=np.inf)
        for made in curves.values()
    ]
    yield Row(
        "mean cost at availability >= 0.999",
        "<= 0.55",
        f"{np.mean(high):.3f} ({', '.join(f'{cost:.3f}' for cost in high)})",
        bool(np.mean(high) <= 0.55),
    )


class Model(NamedTuple):
    """A model of SpotServe's experiments: profile, fewest accelerators, bytes, rate, arrivals."""

    profile: str
    fewest: int
    weight_bytes: float
    requests_per_s: float
    arrivals: str


MODELS = {
    "6.7B": Model("megatron_6.7B", 4, 25.0e9, 2.0, "query_tpt1.5_cv6"),
    "20B": Model("megatron_h6144", 12, 74.5e9, 0.4, "query_tpt0.35_cv6"),
    "30B": Model("megatron_h7168", 16, 111.8e9, 0.2, "query_tpt0.2_cv6"),
}
SITES = {"As": "trace_0304_real", "Bs": "trace_0506_real"}
HOSTS = 10  # the artifact's rerouting fixes its pipelines for all hosts that it was given
SPOT_USD, ON_DEMAND_USD = 1.9, 3.912  # g4dn.12xlarge, per hour
FOLDER = DATA / "spotserve"


def serving() -> Iterator[Row]:
    """Each pair of model and trace."""
    for name, model in MODELS.items():
        path = FOLDER / "profile" / "T4-4x" / f"{model.profile}_profile.json"
        times = read_layer_times(path, model.fewest, model.weight_bytes)
        lines = (FOLDER / "arrivals" / f"{model.arrivals}.txt").read_text().splitlines()
        arrivals_s = [float(line.split(",")[1]) for line in lines]
        for trace, file in SITES.items():
            yield _pair(f"SpotServe {name} on {trace}", model, times, arrivals_s, file)


def _pair(name: str, model: Model, times: LayerTimes, arrivals_s: list[float], file: str) -> Row:
    changes, end_s = _changes(file)
    p99, spot_usd = {}, 0.0
    for way in ("rerouting", "migrating"):
        made = Serving(way, times, Site(planned=HOSTS), model.requests_per_s, 128)
        made.run(arrivals_s, changes, end_s)
        p99[way] = float(np.percentile(made.latencies_s, 99))
        spot_usd = made.machine_s / 3600 * SPOT_USD
    fewest, on_demand_usd = _on_demand(model, times, arrivals_s, end_s, p99["migrating"])
    ratio = p99["rerouting"] / p99["migrating"]
    return Row(
        f"{name}: P99 of rerouting / ours",
        ">= 2.4",
        f"{p99['rerouting']:.1f} / {p99['migrating']:.1f} s = {ratio:.2f}; ${spot_usd:.2f}, "
        f"on demand ${on_demand_usd:.2f} ({fewest} machines for the same P99)",
        ratio >= 2.4,
    )


def _on_demand(
    model: Model, times: LayerTimes, arrivals_s: list[float], end_s: float, p99_s: float
) -> tuple[int, float]:
    """The fewest steady machines that answer as fast (within 2 %), and what they cost."""
    for count in range(-(-model.fewest // 4), 41):
        made = Serving("migrating", times, Site(), model.requests_per_s, 128)
        made.run(arrivals_s, [Change(0.0, tuple(f"o{n}" for n in range(count)), ())], end_s)
        if np.percentile(made.latencies_s, 99) <= 1.02 * p99_s:
            return count, count * end_s / 3600 * ON_DEMAND_USD
    raise AssertionError("forty machines do not answer as fast")


def _changes(file: str) -> tuple[list[Change], float]:
    changes, end_s = [], 0.0
    for line in (FOLDER / "trace_seg" / f"{file}.txt").read_text().splitlines():
        at_ms, kind, more = json.loads(line)
        names = tuple(more["nodes"])
        if kind == "add":
            changes.append(Change(at_ms / 1000, names, ()))
        elif kind == "remove":
            changes.append(Change(at_ms / 1000, (), names))
        elif kind == "DONE":
            end_s = at_ms / 1000
    return changes, end_s


def bamboo() -> Iterator[Row]:
    """Its published rows, and its recorded trace."""
    for removal, theirs in PUBLISHED.items():
        ours = mean_row(removal)
        off = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True) if b)
        shown = ", ".join(f"{value:.4g}" for value in ours)
        yield Row(
            f"Bamboo at {removal:.0%} removals an hour",
            "within 3 %",
            f"{shown} ({off:.2%} off)",
            off <= 0.03,
        )
    yield run(Suite("Bamboo's p3 trace replayed", ("tests/autoscale/test_simulate_bamboo.py",)))


def week() -> Iterator[Row]:
    """A hundred machines, a million requests, seven days."""
    market = made_market(2016, ("e1a", "e1b", "e2a", "w1a", "w1b", "w2a"), depth=60, seed=1)
    history = made_market(2016, ("e1a", "e1b", "e2a", "w1a", "w1b", "w2a"), depth=60, seed=2)
    chain = fit(
        history.capacity,
        tuple(offer.name for offer in market.spot),
        tuple(offer.region for offer in market.spot),
        levels_for(100, 60),
        market.period_s,
    )
    speed = ReplicaSpeed(4, 2000.0, 0.8, 1.0)
    load = RequestLoad(daily_arrivals(1_000_000, 2016 * 300.0, seed=1), speed, most=100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s, cpu_s = time.monotonic(), time.process_time()
    report = replay(market, MixedPolicy(20.0), SpotRisk(chain), load)
    took_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    yield Row(
        "a week of 100 machines and 1e6 requests",
        "<= 60 s of one core",
        f"{cpu_s:.0f} s ({took_s:.0f} s beside others); "
        f"{load.served} served, {load.waiting} waiting, {grown:.0f} MiB more; "
        f"available {report.availability:.4f} at {report.cost:.3f}; P99 first token "
        f"{load.first_s.at(0.99):.1f} s, {load.moved} moved, {load.restarted} restarted",
        cpu_s <= 60 and load.served > 990_000,
    )
