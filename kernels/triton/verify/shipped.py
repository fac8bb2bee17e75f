"""Every case and every refusal of every kernel module, and a key that changes when a case does.

Works with and without the interpreter. Called by `aot.py`, `worker.py`, `roofline.py` and tests.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import textwrap
from typing import Any

import kernels.triton
from kernels.triton.case import Case, Refused
from kernels.triton.targets import Target


def modules() -> list[str]:
    """The names of the modules in kernels/triton that have `cases`."""
    found = []
    for info in pkgutil.iter_modules(kernels.triton.__path__):
        if not info.ispkg and hasattr(load(info.name), "cases"):
            found.append(info.name)
    return found


def load(module: str) -> Any:
    return importlib.import_module(f"kernels.triton.{module}")


def shipped(module: str, target: Target) -> list[Case | Refused]:
    """What the module says of the target. AssertionError if two cases have one name."""
    every: list[Case | Refused] = list(load(module).cases(target))
    names = [each.name for each in every if isinstance(each, Case)]
    assert len(set(names)) == len(names), f"{module} has a name twice on {target.name}: {names}"
    return every


def key(case: Case, version: str) -> str:
    """Of a case, with the version of Triton that compiles it: two cases with one key compile to
    one binary. Comments, docstrings and places in a file do not count."""
    said = [
        version,
        *sorted(_sources(case.kernel)),
        json.dumps([sorted(case.signature.items()), sorted(case.constants.items())]),
        json.dumps([sorted(case.divisible), case.num_warps, case.num_stages]),
        json.dumps([case.matrix, case.fp_fusion]),
    ]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _sources(kernel: Any) -> set[str]:
    """The source of a kernel, of what it calls, and the constants of the files that both use."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        fn = waiting.pop().fn
        name = f"{fn.__module__}.{fn.__qualname__}"
        if name in found:
            continue
        text, used = _written(fn)
        found[name] = f"{name}: {text}"
        for each in used & set(fn.__globals__):
            value = fn.__globals__[each]
            if hasattr(value, "fn") and value.fn.__module__.startswith(kernels.triton.__name__):
                waiting.append(value)
            elif type(value).__name__ == "constexpr":
                found[each] = f"{fn.__module__}.{each} = {value.value}"
    return set(found.values())


@functools.cache
def _written(fn: Any) -> tuple[str, frozenset[str]]:
    """A function's source without comments and docstrings, and the names in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    names = frozenset(each.id for each in ast.walk(tree) if isinstance(each, ast.Name))
    return ast.unparse(tree), names
