"""`make prove-serve`: everything the first slice promises, measured, in one table.

Each module of checks yields rows as it measures them; each is printed at once, and all of them as
a table at the end. The exit status is 0 only when every row is ok.

    python -m tests.prove.serve                     all of it, about an hour
    python -m tests.prove.serve --only kv,models    some modules
    python -m tests.prove.serve --json rows.json    the rows for another program, too
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from tests.prove.attempt import attempt
from tests.prove.row import Row, print_rows

# Cheap ones first; what needs a fresh clone last.
MODULES = ("house", "kv", "engine", "models", "disaggregation", "client", "faults", "install")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen modules; 1 when a row is missed or there is none."""
    options = _parse(arguments)
    rows: list[Row] = []
    for name in options.only:
        print(f"== {name}", flush=True)
        started_s = time.monotonic()
        for row in attempt(name, partial(_rows, name)):
            rows.append(row)
            verdict = "ok" if row.ok else "MISSED"
            print(f"   {verdict:6}  {row.check}: {row.measured} (target {row.target})", flush=True)
        print(f"== {name}: {time.monotonic() - started_s:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    print()
    complete = print_rows(rows)
    missed = sum(not row.ok for row in rows)
    print(f"\n{len(rows)} checks, {missed} missed")
    return 0 if rows and complete else 1


def _rows(name: str) -> Iterator[Row]:
    module = import_module(f"tests.prove.{name}")
    yield from module.rows()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prove-serve", description="Measure every promise.")
    parser.add_argument("--only", type=_names, default=MODULES, help=f"some of {','.join(MODULES)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no module of checks; known are {', '.join(MODULES)}"
        )
    return names


if __name__ == "__main__":
    sys.exit(main())
