"""Proof rows of the house: its own tests of structure and style, run once more for the table."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.prove.row import Row

ROOT = Path(__file__).parents[2]
LIMIT_S = 600


class Check(NamedTuple):
    """A promise about the code, and the test files that hold it."""

    name: str
    files: tuple[str, ...]


CHECKS = (
    Check("who imports whom", ("tests/house/test_imports.py", "tests/house/test_dependencies.py")),
    Check("files and functions within the style", ("tests/house/test_style.py",)),
    Check("the request's path is serve/README.md's", ("tests/house/test_path.py",)),
)


def rows() -> Iterator[Row]:
    """One row per check."""
    return map(_row, CHECKS)


def _row(check: Check) -> Row:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *check.files],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    summary = done.stdout.strip().rpartition("\n")[2].strip("= ")
    clean = done.returncode == 0 and "skipped" not in summary
    return Row(check.name, "tests green", summary, clean)
