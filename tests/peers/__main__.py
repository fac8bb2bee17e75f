"""`python -m tests.peers`: the peers table alone, with its single rounds as JSON and as a picture.

python -m tests.peers --engines sanderling,llama.cpp    some servers; speeds against the first
python -m tests.peers --json f.json --plot f.png        also written to files
"""

import argparse
import json
import signal
import sys
import textwrap
from pathlib import Path

from tests.peers.engines import ENGINES
from tests.peers.measures import COMPARED, Result, compare, measures, running
from tests.prove.peers import row, started
from tests.prove.row import print_rows


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 when a server did not get through everything."""
    options = _parse(arguments)
    results: list[Result] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with us
    with running(options.engines) as peers:
        rows = [started(peers)]
        for measure in measures():
            results.append(compare(peers, measure))
            rows.append(row(results[-1]))
            print(f"{rows[-1].check}: {rows[-1].measured}", flush=True)
    print()
    complete = print_rows(rows)
    if options.json:
        options.json.write_text(json.dumps([_plain(result) for result in results], indent=1))
    if options.plot:
        draw(results, options.plot)
    return 0 if complete else 1


def draw(results: list[Result], path: Path) -> None:
    """Write the PNG: a panel for each measure, a bar for each server, a dot for each round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(results), 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        names = list(result.values)
        axes.bar(names, [result.median(name) for name in names], color="lightsteelblue")
        for place, name in enumerate(names):
            axes.plot([place] * len(result.values[name]), result.values[name], "k.", markersize=4)
        arrow = "more" if result.measure.more_is_better else "less"
        axes.set_title(
            f"{textwrap.fill(result.measure.name, 36)}\n{result.measure.unit}, {arrow} is better",
            size=7,
        )
        axes.tick_params(axis="x", rotation=30, labelsize=7)
    figure.savefig(path)


def _plain(result: Result) -> dict[str, object]:
    measure = result.measure
    return {
        "measure": measure.name,
        "unit": measure.unit,
        "more_is_better": measure.more_is_better,
        "rounds": result.values,
        "failed": result.failed,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in ENGINES]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is no server; known are {', '.join(ENGINES)}"
            )
        return chosen

    parser = argparse.ArgumentParser(prog="peers", description="Compare with other servers.")
    parser.add_argument("--engines", type=names, default=COMPARED, help=f"of {','.join(ENGINES)}")
    parser.add_argument("--json", type=Path, help="also write every round to this file")
    parser.add_argument("--plot", type=Path, help="also draw the table to this PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
