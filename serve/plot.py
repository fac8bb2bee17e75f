"""A picture of a bench report: first-token and end-to-end latencies of every request, sorted.

matplotlib is optional (`pip install sanderling[plot]`). Called by `sanderling bench serve --plot`.
"""

import importlib.util
from pathlib import Path
from typing import Any


def refuse_without_library() -> None:
    """ValueError when there is nothing to draw with, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; `pip install sanderling[plot]` brings it")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG: share of requests (y) that took at most so many seconds (x)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    count = len(report["requests"])
    shares = [(place + 1) / count for place in range(count)]
    for column, label in ((0, "time to first token"), (1, "end to end")):
        axes.step(sorted(r[column] for r in report["requests"]), shares, where="post", label=label)
    if report["slo"] is not None and report["slo"]["first_s"] < float("inf"):
        axes.axvline(report["slo"]["first_s"], linestyle="--", color="gray", label="promised first")
    axes.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    title = f"{count} requests, {report['output_tokens_per_s']:.1f} output tokens/s"
    axes.set_title(f"{title}, {report['within_slo']:.0%} within the promise")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)
