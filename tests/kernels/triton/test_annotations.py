"""Whatever is no kernel is annotated: mypy is told to let the functions of these files pass."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "kernels" / "triton"


def bare(source: str) -> list[str]:
    """The functions that are not under triton.jit and leave a type out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
            continue
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        named = [each for each in every if each is not None and each.arg not in ("self", "cls")]
        if node.returns is None or any(each.annotation is None for each in named):
            found.append(node.name)
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_functions_are_annotated(path: Path):
    assert bare(path.read_text("utf-8")) == []


def test_a_bare_function_is_seen():
    kernel = "@triton.jit(do_not_specialize=['M'])\ndef k(x, B: tl.constexpr):\n    pass\n"
    assert bare(kernel + "def f(x: int):\n    pass\ndef g(x, *, y: int) -> None:\n    pass") == [
        "f",
        "g",
    ]
