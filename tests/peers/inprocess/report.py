"""The table of tests/peers/inprocess as text, as JSON and as a picture. Called by
tests/prove/kernel_peers.py."""

from pathlib import Path

from tests.peers.inprocess.compare import CELLS, Source, Table


def text(table: Table) -> str:
    """Medians in tokens per second, a line for each engine and way, a column for each cell."""
    lines = [["tokens/s", "timed", *CELLS]]
    for source in _sources(table):
        lines.append([source.engine, source.way, *(_figure(table, c, source) for c in CELLS)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*aligned, *(f"{name}: {why}" for name, why in table.failed.items())])


def plain(table: Table) -> dict[str, object]:
    """Everything, for JSON."""
    figures = [
        {"cell": cell, "engine": source.engine, "timed": source.way, "tokens_per_s": rounds}
        for cell, sources in table.values.items()
        for source, rounds in sources.items()
    ]
    return {
        "cells": {name: cell._asdict() for name, cell in CELLS.items()},
        "versions": table.versions,
        "failed": table.failed,
        "rounds": table.rounds,
        "waiting_share": table.idlers,
        "foreign_cores": table.foreign,
        "figures": figures,
    }


def draw(table: Table, path: Path) -> None:
    """Write the PNG: a panel for each cell, a bar for each engine and way, a dot for each round."""
    from matplotlib.figure import Figure

    sources = _sources(table)
    figure = Figure(figsize=(14, 1.6 + 0.3 * len(sources)), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(CELLS), sharey=True)
    for axes, cell in zip(panels, CELLS, strict=True):
        for place, source in enumerate(sources):
            rounds = table.values.get(cell, {}).get(source, [])
            if rounds:
                colour = "seagreen" if source.engine.startswith("sanderling") else "lightsteelblue"
                axes.barh(place, table.median(cell, source), color=colour)
                axes.plot(rounds, [place] * len(rounds), "k.", markersize=3)
        axes.set_title(f"{cell}, tokens/s", size=9)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(sources)), [f"{s.engine} ({s.way})" for s in sources], size=8)
    panels[0].invert_yaxis()
    figure.suptitle("SmolLM2-135M on 2 threads; bars are medians, dots are rounds", size=10)
    figure.savefig(path)


def _sources(table: Table) -> list[Source]:
    return list(dict.fromkeys(s for sources in table.values.values() for s in sources))


def _figure(table: Table, cell: str, source: Source) -> str:
    if source not in table.values.get(cell, {}):
        return "-"
    return f"{table.median(cell, source):.4g}"
