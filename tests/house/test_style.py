"""The measurable part of CONTRIBUTING.md's style: short files, short functions, docstrings."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.house.imports import OURS

ROOT = Path(__file__).parents[2]
FILE_LINES = 350
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 15


class Function(NamedTuple):
    """A function and how many lines it takes."""

    where: str
    lines: int


def sources() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            yield Function(where, node.end_lineno - node.lineno + 1)


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > FILE_LINES} == {}


def test_functions_are_short():
    every = [function for path in sources() for function in functions(path)]
    median = statistics.median(function.lines for function in every)
    print(f"{len(every)} functions, median {median} lines, longest {max(f.lines for f in every)}")
    assert [function for function in every if function.lines > FUNCTION_LINES] == []
    assert median <= MEDIAN_FUNCTION_LINES


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_function_lengths_are_counted(tmp_path: Path):
    """The counter itself: decorators do not count, nested functions count twice."""
    file = ROOT / "cluster" / "registry.py"
    assert {function.where.split()[-1] for function in functions(file)} == {"load", "names"}
    assert all(3 <= function.lines <= 10 for function in functions(file))
