"""Pictures of replays: the course of one, and policies beside each other as cost against
availability.

matplotlib is optional (`pip install sanderling[plot]`). Called by `sanderling simulate --plot`.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from autoscale.simulate.replay import Report


def refuse_without_library() -> None:
    """ValueError when there is nothing to draw with, before anything is simulated."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; `pip install sanderling[plot]` brings it")


def draw(curves: Mapping[str, Sequence[Report]], course: Report, bound: float, path: Path) -> None:
    """Write the PNG: above, share of steps short of replicas (y) against cost (x), one line for
    each policy and the bound; below, machines over time of `course`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1)
    least = 0.5 / max(report.steps for reports in curves.values() for report in reports)
    for name, reports in curves.items():
        costs = [report.cost for report in reports]
        short = [max(least, 1 - report.availability) for report in reports]
        above.plot(costs, short, marker="o", label=name)
    above.axvline(bound, linestyle="--", color="gray", label="all-knowing")
    above.set(xlabel="cost, share of all on demand", ylabel="share of steps short", yscale="log")
    above.set_title("less and further left is better")
    above.grid(alpha=0.3, which="both")
    above.legend()
    hours = [at / 3600 for at, *_ in course.course]
    below.step(hours, [need for _, need, _, _ in course.course], color="black", label="needed")
    below.step(hours, [ready for _, _, ready, _ in course.course], label="answering", alpha=0.8)
    below.step(hours, [spot for *_, spot in course.course], label="spot held", alpha=0.8)
    below.set(xlabel="hours", ylabel="machines", title=course.policy)
    below.set_ylim(bottom=0)
    below.grid(alpha=0.3)
    below.legend(loc="lower right")
    figure.savefig(path)
