"""The picture of a simulated loop: machines, dollars and latency over time.

matplotlib is optional (`pip install sanderling[plot]`).
"""

import math
from pathlib import Path

from autoscale.simulate.loop import LoopReport


def draw_loop(report: LoopReport, policy: str, path: Path) -> None:
    """Write the PNG: replicas needed and answering over machines held; dollars per hour; the first
    token's 90th percentile of each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    machines, cost, latency = figure.subplots(3, 1, sharex=True)
    hours = [point.at_s / 3600 for point in report.course]
    held = [point.machines for point in report.course]
    spot = [point.spot for point in report.course]
    machines.fill_between(hours, held, step="pre", alpha=0.2, color="tab:blue", label="on demand")
    machines.fill_between(hours, spot, step="pre", alpha=0.4, color="tab:orange", label="spot")
    answering = [point.answering for point in report.course]
    machines.step(hours, answering, color="tab:green", label="answering")
    needed = [point.need for point in report.course]
    machines.step(hours, needed, color="black", linestyle=":", label="needed")
    machines.set(ylabel="machines", title=f"{policy}: {report.availability:.3%} of steps enough")
    machines.legend(loc="lower right", ncols=4)
    cost.step(hours, [point.usd_per_h for point in report.course], color="tab:red")
    cost.set(ylabel="$ per hour", title=f"${report.usd:.0f} in all")
    first_s = [point.first_p90_s or math.nan for point in report.course]
    latency.plot(hours, first_s, linewidth=0.8, color="tab:purple")
    latency.set(ylabel="first token, P90 (s)", xlabel="hours", yscale="log")
    for axes in (machines, cost, latency):
        axes.grid(alpha=0.3)
    machines.set_ylim(bottom=0)
    cost.set_ylim(bottom=0)
    figure.savefig(path)
