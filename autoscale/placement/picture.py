"""A picture of a plan: what each purchase costs and how full it is, and where each bucket goes.

matplotlib is optional (`pip install sanderling[plot]`). Called by `sanderling plan --picture`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoscale.placement.demand import Slo
from autoscale.placement.feasible import Verdict
from autoscale.placement.plan import Plan
from autoscale.placement.planner import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_BUCKETS = 16


def refuse_without_library() -> None:
    """ValueError when there is nothing to draw with, before anything is planned."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib; `pip install sanderling[plot]` brings it")


def draw(plan: Plan, problem: Problem, verdict: Verdict, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.figure import Figure

    tall = max(3.2, 0.32 * min(SHOWN_BUCKETS, len(problem.demand.requests_per_s)) + 1.6)
    figure = Figure(figsize=(11, max(tall, 0.6 * len(plan.purchases) + 1.6)), dpi=120)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    if plan.spans:
        _spans(right, plan)
    else:
        _routing(right, plan, problem)
    _purchases(left, plan, problem)
    proved = "proved best" if plan.gap <= 1e-6 else f"gap {plan.gap:.1%}"
    checked = "checked" if verdict.feasible else "THE CHECK FINDS FAULT WITH IT"
    title = f"{plan.usd_per_h:.2f} $/h for {problem.demand.total_per_s:.4g} requests/s"
    figure.suptitle(f"{title}; {proved}, {checked}")
    figure.savefig(path)


def _labels(plan: Plan) -> list[str]:
    """One a purchase, none twice."""
    names = []
    for purchase in plan.purchases:
        shape = purchase.shape
        words = [f"{purchase.machines} x {purchase.offer}"]
        words += [f"tensor {shape.tensor}"] if shape.tensor > 1 else []
        words += [f"pipeline {shape.pipeline}"] if shape.pipeline > 1 else []
        words += [shape.role] if shape.role != "mixed" else []
        names.append(", ".join(words))
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names)]


def _purchases(axes: "Axes", plan: Plan, problem: Problem) -> None:
    """Bars of $/h, with how full their replicas are by the profile's rates."""
    labels, places = _labels(plan), range(len(plan.purchases))
    costs = [purchase.usd_per_h for purchase in plan.purchases]
    axes.barh(list(places), costs, color=[f"C{place % 10}" for place in places])
    for place, load in zip(places, _loads(plan, problem), strict=True):
        full = f" {costs[place]:.2f} $/h" + (f", {load:.0%} full" if load is not None else "")
        axes.text(costs[place], place, full, va="center", fontsize=8)
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="$/h", title="bought", xlim=(0, 1.6 * max(costs, default=1.0) or 1.0))


def _loads(plan: Plan, problem: Problem) -> Sequence[float | None]:
    """Share of a purchase's replicas in use; None where no requests are routed to it."""
    slo: Slo = problem.demand.slo
    loads: list[float | None] = [None] * len(plan.purchases)
    for bucket, shares in plan.routing.items():
        for place, share in shares.items():
            purchase = plan.purchases[place]
            rate = problem.profile.requests_per_s(purchase.shape, bucket, slo)
            given = problem.demand.requests_per_s.get(bucket, 0.0) * share
            if rate > 0 and purchase.replicas:
                loads[place] = (loads[place] or 0.0) + given / rate / purchase.replicas
    return loads


def _routing(axes: "Axes", plan: Plan, problem: Problem) -> None:
    """Of the busiest buckets, where their requests go, in the colours of the purchases; prefill and
    decode apart each count half."""
    rates = problem.demand.requests_per_s
    shown = sorted(sorted(rates, key=lambda bucket: -rates[bucket])[:SHOWN_BUCKETS])
    apart = any(purchase.shape.role in ("prefill", "decode") for purchase in plan.purchases)
    begun = [0.0] * len(shown)
    for place, purchase in enumerate(plan.purchases):
        halves = 0.5 if apart and purchase.shape.role != "mixed" else 1.0
        shares = [halves * plan.routing.get(bucket, {}).get(place, 0.0) for bucket in shown]
        axes.barh(range(len(shown)), shares, left=begun, color=f"C{place % 10}")
        begun = [before + share for before, share in zip(begun, shares, strict=True)]
    names = [f"{bucket[0]} + {bucket[1]}  ({rates[bucket]:.3g}/s)" for bucket in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    more = f", the busiest {len(shown)} of {len(rates)}" if len(shown) < len(rates) else ""
    axes.set(xlim=(0, 1), xlabel="share of the requests", title=f"tokens in + out, served by{more}")
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])


def _spans(axes: "Axes", plan: Plan) -> None:
    """Layers of each node, and the tokens that flow into it."""
    spans = sorted(plan.spans, key=lambda span: (span.start, span.node))
    for place, span in enumerate(spans):
        tokens = sum(flow for (_, to), flow in plan.flow_tokens_per_s.items() if to == span.node)
        axes.barh(place, span.stop - span.start, left=span.start, color="C0")
        axes.text(span.stop, place, f" {tokens:.0f} tokens/s", va="center", fontsize=7)
    axes.set_yticks(range(len(spans)), [span.node for span in spans], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="layers", title="layers of each node", xlim=(0, 1.2 * spans[-1].stop))
