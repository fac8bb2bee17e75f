"""How a proof is run: modules of checks, each row printed as it is measured, then all of them.

`main` is behind `make prove-serve` and `make prove-service`. The exit status is 0 only when every
row is ok.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

from tests.prove.attempt import attempt
from tests.prove.row import Row, print_rows


def main(program: str, modules: tuple[str, ...], arguments: list[str] | None = None) -> int:
    """Run the chosen modules; 1 when a row is missed or there is none."""
    options = _parse(program, modules, arguments)
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


def _parse(
    program: str, modules: tuple[str, ...], arguments: list[str] | None
) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in modules]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is no module of checks; known are {', '.join(modules)}"
            )
        return chosen

    parser = argparse.ArgumentParser(prog=program, description="Measure every promise.")
    parser.add_argument("--only", type=names, default=modules, help=f"some of {','.join(modules)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(arguments)
