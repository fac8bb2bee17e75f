"""Advice for people: a table in the terminal, and a picture of what a step's seconds go into."""

import importlib.util
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.advise.options import Settings
from train.advise.ranking import Advice, Advised
from train.view import MIB, duration

SHOWN = 12
FAILURES = 6
PARTS = ("compute", "bubble", "exchange", "update", "moved")


def refuse_without_library() -> None:
    """ValueError when there is nothing to draw with, before anything is tried."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; `pip install sanderling[plot]` brings it")


def print_advice(advice: Advice, console: Console) -> None:
    """The fastest forms, what does not fit, and where the figures are from."""
    console.print(_ranking(advice))
    best = advice.ranked[0]
    if best.cost.pipeline is not None:
        console.print(_stages(advice, best), highlight=False, soft_wrap=True)
    if advice.asked is not None:
        times = advice.asked.step_s / best.step_s
        said = f"The job as it is: {_step(advice.asked)} a step, {times:.2f} x the first."
        console.print(said, highlight=False, soft_wrap=True)
    for why, count in advice.refused.most_common(FAILURES):
        console.print(f"Not accepted ({count}): {why}", highlight=False, soft_wrap=True)
    if len(advice.refused) > FAILURES:
        console.print(f"... and for {len(advice.refused) - FAILURES} more reasons")
    for settings, why in advice.too_large[:FAILURES]:
        console.print(
            f"Does not fit: {told_as_toml(settings)}: {why}", highlight=False, soft_wrap=True
        )
    if len(advice.too_large) > FAILURES:
        console.print(f"... and {len(advice.too_large) - FAILURES} more that do not fit")
    for source in advice.machines.sources:
        console.print(f"From {source}.", highlight=False, soft_wrap=True)


def _ranking(advice: Advice) -> Table:
    table = Table("", "settings", "memory/worker", "step", "tokens/s", "in all", show_header=True)
    priced = advice.machines.usd_per_h > 0
    if priced:
        table.add_column("$")
    for place, advised in enumerate(advice.ranked[:SHOWN], 1):
        tokens_per_s = advised.job.run.batch_tokens / advised.step_s
        cells = [
            str(place),
            told_as_toml(advised.settings),
            f"{advised.cost.memory.total / MIB:,.0f} MiB",
            _step(advised),
            f"{tokens_per_s:,.0f}",
            duration(advised.hours() * 3600),
        ]
        table.add_row(*cells, *([f"{advice.usd(advised):,.4f}"] if priced else []))
    return table


def told_as_toml(settings: Settings) -> str:
    """As a file has them."""
    return ", ".join(f"{name} = {_written(value)}" for name, value in settings.items())


def _written(value: object) -> str:
    """As TOML has it."""
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value) if isinstance(value, tuple) else value).lower()


def _step(advised: Advised) -> str:
    return f"{advised.step_s * 1e3:,.0f} ms" if advised.step_s < 10 else duration(advised.step_s)


def _stages(advice: Advice, advised: Advised) -> str:
    pipeline = advised.cost.pipeline
    assert pipeline is not None
    kinds = advice.machines.kinds
    said = []
    for stage in pipeline.stages:
        members = [f"{n} x {k.name}" for k, n in zip(kinds, stage.group, strict=True) if n]
        said.append(f"layers {stage.start}..{stage.stop - 1} on {' and '.join(members)}")
    return f"Its pipeline: {'; '.join(said)}."


def draw(advice: Advice, path: Path) -> None:
    """A bar for each of the fastest forms, from its parts; writes a PNG."""
    from matplotlib.figure import Figure

    shown = list(advice.ranked[:SHOWN])
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    begun = [0.0] * len(shown)
    for place, part in enumerate(PARTS):
        values = [1e3 * getattr(advised.cost.seconds, part) for advised in shown]
        if any(values):
            axes.barh(range(len(shown)), values, left=begun, label=part, color=f"C{place}")
        begun = [a + b for a, b in zip(begun, values, strict=True)]
    for place, advised in enumerate(shown):
        size = f" {advised.cost.memory.total / MIB:,.0f} MiB"
        axes.text(begun[place], place, size, va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [told_as_toml(a.settings) for a in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms of a step", title=f"{shown[0].job.name}: the fastest forms, as estimated")
    axes.set_xlim(0, 1.1 * max(begun))  # room for the sizes
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8)
    figure.savefig(path)
