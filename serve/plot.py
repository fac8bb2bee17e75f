"""Pictures of bench reports: latencies of every request, sorted; linears under their limits.

matplotlib is optional (`pip install sanderling[plot]`). Called by `sanderling bench --plot`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.cpu.bench import Report
    from kernels.cpu.ops import Packed


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


def draw_kernels(report: "Report", matrices: "Sequence[Packed]", path: Path) -> None:
    """Write the PNG: products per second (y) by products for each byte of weights (x), under the
    limits of memory and of arithmetic that were measured beside them."""
    from matplotlib.figure import Figure

    from kernels.cpu.bench import PASSES

    read = sum(weight.data.numel() for weight in matrices)
    once = sum(weight.padded_rows * weight.columns for weight in matrices)
    limits = report.limits
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    intensities = [max(PASSES.values()) * f.m * once / read for f in report.figures]
    reach = [min(intensities) / 3, max(intensities) * 2]
    knee = limits.products_per_s / limits.bytes_per_s
    xs = sorted({reach[0], min(max(knee, reach[0]), reach[1]), reach[1]})
    roof = [min(x * limits.bytes_per_s, limits.products_per_s) / 1e9 for x in xs]
    axes.plot(xs, roof, color="black", label="measured limit: memory, then arithmetic")
    for activations, marker in (("accurate", "o"), ("fast", "s")):
        chosen = [f for f in report.figures if f.activations == activations]
        x = [PASSES[activations] * f.m * once / read for f in chosen]
        y = [PASSES[activations] * f.m * once / f.seconds / 1e9 for f in chosen]
        axes.plot(x, y, marker=marker, label=f"{activations} activations")
        for at, height, f in zip(x, y, chosen, strict=True):
            axes.annotate(f"{f.m}", (at, height), (4, -11), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="products of bytes for each byte of weights")
    axes.set(ylabel="G products of bytes per second", title="all linears of a step, by rows")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path)
