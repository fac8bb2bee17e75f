"""The page of a measurement: what `python -m kernels.triton.bench --json` wrote, as Markdown.

python -m kernels.triton.bench.page kernels/triton/bench/h100.json docs/kernels-h100.md
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = """# Kernels measured on one {gpu}

{gpu}, torch {torch}, Triton {triton}: written by `python -m kernels.triton.bench.page` from what \
`python -m kernels.triton.bench` measured on one card. Nothing is said of other cards.

A time is the median of rounds in which all contenders take turns, inside CUDA graphs that walk \
over copies of the weights or of the cache, so that they come from memory. The ratio is to the \
fastest of the peers: above 1 the kernel of this project is faster. Bandwidth is a share of what \
torch's copy reaches, {copy:.2f} TB/s, counting the bytes of the first of a row's kernels alone \
(of float16, for attention over pages). Error is the root mean square of the difference to a \
float32 oracle, relative to that of the oracle. Outside a graph a launch from Python takes \
{launch:.0f} us here, one of torch's own {torch_launch:.0f} us.
"""


def markdown(report: dict[str, Any]) -> str:
    """All rows of a report, a table for each group, behind what it says of changes since."""
    parts = [
        HEAD.format(
            gpu=report["gpu"],
            torch=report["torch"],
            triton=report["triton"],
            copy=report["copy_bytes_per_s"] / 1e12,
            launch=report["host_launch_s"] * 1e6,
            torch_launch=report["host_torch_s"] * 1e6,
        )
    ]
    if report.get("since"):
        parts += ["\n## Changed since\n", *(f"- {each}" for each in report["since"])]
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        parts += [
            f"\n## {group}\n",
            "| case | kernel | us | ratio | fastest peer | us | bandwidth | error |",
            "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
        ]
        for row in report["rows"]:
            if row["group"] == group:
                parts += _lines(row)
    return "\n".join(parts) + "\n"


def _lines(row: dict[str, Any]) -> Iterator[str]:
    if "ours" not in row or "failure" in row:
        why = row.get("failure", "no time was left")
        yield f"| {row['case']} | not measured: {why} | | | | | | |"
        return
    peers = [each for each in row["peers"] if "us" in each]
    best = min(peers, key=lambda each: each["us"], default=None)
    for number, each in enumerate(row["ours"]):
        if "us" not in each:
            yield f"| {row['case']} | {each['name']}: {each['failure']} | | | | | | |"
            continue
        share = each.get("of_copy_bandwidth") if number == 0 else None
        cells = [
            row["case"],
            each["name"],
            f"{each['us']:.1f}",
            "" if best is None else f"{best['us'] / each['us']:.2f}",
            "" if best is None else best["name"],
            "" if best is None else f"{best['us']:.1f}",
            "" if share is None else f"{share:.2f}",
            "" if each.get("error") is None else f"{each['error']:.1e}",
        ]
        yield "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("page", type=Path)
    asked = parser.parse_args()
    report = json.loads(asked.report.read_text(encoding="utf-8"))
    asked.page.write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
