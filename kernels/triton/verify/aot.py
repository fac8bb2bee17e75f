"""Layer C, the sweep: every case of every kernel for every GPU of the catalogue, without a GPU.

    python -m kernels.triton.verify.aot [--targets sm_80,gfx942] [--ops w4_linear] [--seconds 100]

What is known of a case stays in kernels/triton/aot.json under the key of its source and constants,
so that only what has changed is compiled again, and a sweep may stop and go on. Ends with 1 when
a case has a fault or is missing. docs/kernels.md is written from the same file.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from kernels.triton.case import Case, Refused
from kernels.triton.targets import TARGETS, Target
from kernels.triton.verify.matrix import markdown
from kernels.triton.verify.shipped import key, modules, shipped
from kernels.triton.verify.worker import Worker

RESULTS = Path(__file__).parents[1] / "aot.json"
MATRIX = Path(__file__).parents[3] / "docs" / "kernels.md"
DEADLINE_S = 60.0  # for one case
SAVE_EVERY = 10  # cases

Results = dict[str, dict[str, dict[str, Any]]]


class Item(NamedTuple):
    """A case, or a refusal, that should be in the results; both stand under `name`."""

    module: str
    target: Target
    name: str
    case: Case | None
    entry: dict[str, Any]


def items(targets: tuple[Target, ...] = TARGETS) -> Iterator[Item]:
    """Everything that ships or is refused, and what is known of it before compiling."""
    triton = version("triton")
    for target in targets:
        for module in modules():
            for each in shipped(module, target):
                if isinstance(each, Refused):
                    yield Item(module, target, each.op, None, {"refused": each.why})
                else:
                    yield Item(module, target, each.name, each, {"key": key(each, triton)})


def read() -> Results:
    """By target, then by name."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def write(results: Results) -> None:
    """One line for each entry, in order, so that a change is a short difference."""
    blocks = []
    for name in [each.name for each in TARGETS if each.name in results]:
        lines = [
            f"    {json.dumps(case)}: {json.dumps(entry)}"
            for case, entry in sorted(results[name].items())
        ]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    RESULTS.write_text("{\n" + ",\n".join(blocks) + "\n}\n", "utf-8")
    MATRIX.write_text(markdown(results), "utf-8")


def outdated(results: Results, item: Item) -> bool:
    """Whether the results say nothing of the item, or something of what it was."""
    known = results.get(item.target.name, {}).get(item.name, {})
    return any(known.get(field) != value for field, value in item.entry.items())


def prune(results: Results, every: list[Item]) -> None:
    """Drops what no longer exists."""
    wanted = {(item.target.name, item.name) for item in every}
    for target in list(results):
        results[target] = {
            name: entry for name, entry in results[target].items() if (target, name) in wanted
        }


def sweep(results: Results, todo: list[Item], seconds: float) -> int:
    """Compiles what is in `todo`, for about that long, into results. How many items are left."""
    stop = time.monotonic() + seconds
    with Worker(DEADLINE_S) as worker:
        for done, item in enumerate(todo):
            if time.monotonic() > stop:
                return len(todo) - done
            entry = dict(item.entry)
            if item.case is not None:
                entry |= worker.compile(item.module, item.target.name, item.name)
            results.setdefault(item.target.name, {})[item.name] = entry
            print(f"{item.target.name:8} {item.name:40} {_line(entry)}", flush=True)
            if done % SAVE_EVERY == 0:
                write(results)
    return 0


def _line(entry: dict[str, Any]) -> str:
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    if entry["faults"]:
        return "; ".join(entry["faults"])
    return f"{entry['registers']} registers, {entry['shared_bytes']} bytes shared {entry['matrix']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(each.name for each in TARGETS))
    parser.add_argument("--ops", default="", help="comma-separated; all of them by default")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    results, every = read(), list(items())
    prune(results, every)
    ops = {op for op in asked.ops.split(",") if op}
    names = asked.targets.split(",")
    todo = [
        item
        for item in every
        if item.target.name in names
        and (not ops or item.name.split("/")[0] in ops)
        and outdated(results, item)
    ]
    left = sweep(results, todo, asked.seconds)
    write(results)
    entries = [entry for by_name in results.values() for entry in by_name.values()]
    refused = sum("refused" in entry for entry in entries)
    bad = sum(bool(entry.get("faults")) for entry in entries)
    missing = sum(outdated(results, item) for item in every)
    ship = len(entries) - bad - refused
    print(f"{ship} cases ship, {refused} ops are refused, {bad} cases have a fault.")
    print(f"{missing} are not compiled, {left} of them were asked for.")
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
