"""Who may import whom: reads every import of a source tree by AST and names each forbidden one.

Relative imports are resolved; imports inside functions and under TYPE_CHECKING count. For the
inner loop (serve/engine, serve/kv, ...) imports are followed through our own modules as well, so
that Ray or HTTP cannot come in by a detour.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

OURS = ("cluster", "serve", "train", "autoscale", "kernels", "models")
HTTP = ("fastapi", "starlette", "uvicorn", "http", "httpx", "aiohttp", "requests")
CLOUD = ("boto3", "botocore", "kubernetes", "google.cloud", "azure")
RAY_PRIVATE = ("ray._private", "ray._raylet", "ray.core.generated", "ray.llm._internal")


@dataclass(frozen=True)
class Rule:
    """Modules under `where` (but not under `except_where`) import none of `forbidden`.

    deep: nor anything of ours that does. A name forbids itself and all below it.
    """

    where: tuple[str, ...]
    forbidden: tuple[str, ...]
    except_where: tuple[str, ...] = ()
    deep: bool = False


RULES = (
    Rule(("cluster",), ("serve", "train", "autoscale", "kernels", "models")),
    Rule(("cluster",), ("ray",), except_where=("cluster.raylocal",)),
    Rule(("cluster.settings", "cluster.clock", "cluster.registry", "cluster.cli"), ("torch",)),
    Rule(("kernels",), ("models", "serve", "train", "autoscale")),
    Rule(("models",), ("serve", "train", "autoscale")),
    Rule(("kernels", "models"), ("ray", *HTTP, *CLOUD)),
    Rule(("serve",), ("train", "autoscale")),
    Rule(("train",), ("serve", "autoscale")),
    Rule(
        ("serve.engine", "serve.kv", "serve.propose", "serve.effort"),
        ("ray", "cluster.raylocal", *HTTP, *CLOUD),
        deep=True,
    ),
    Rule(
        ("autoscale",),
        ("ray", "serve", "train", "models", "kernels", *HTTP, *CLOUD),
        except_where=("autoscale.providers",),
    ),
    Rule(OURS, ("triton",), except_where=("kernels.triton",)),
    Rule(OURS, RAY_PRIVATE, except_where=("cluster.raylocal",)),
)


class Import(NamedTuple):
    """One imported dotted name and its line."""

    name: str
    line: int


class Module(NamedTuple):
    """One source file, its dotted name and what it imports."""

    name: str
    path: Path
    imports: tuple[Import, ...]


def read_tree(root: Path) -> dict[str, Module]:
    """Every module of our packages under `root`, by dotted name."""
    modules = {}
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, path, tuple(_imports(path, name)))
    return modules


def _imports(path: Path, module: str) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _base(node: ast.ImportFrom, package: str) -> str:
    """The absolute module a `from ... import` starts from."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parent = parts[: len(parts) - node.level + 1]
    return ".".join([*parent, *([node.module] if node.module else [])])


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    """`name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(modules: dict[str, Module], rules: tuple[Rule, ...] = RULES) -> list[str]:
    """One sentence for each forbidden import."""
    return [sentence for rule in rules for sentence in _broken(rule, modules)]


def _broken(rule: Rule, modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if not is_under(module.name, rule.where) or is_under(module.name, rule.except_where):
            continue
        for reached in _reached(module, modules) if rule.deep else [module]:
            for found in reached.imports:
                if is_under(found.name, rule.forbidden):
                    detour = "" if reached is module else f" (through {reached.name})"
                    yield f"{module.path}:{found.line}: {module.name} imports {found.name}{detour}"


def _reached(start: Module, modules: dict[str, Module]) -> list[Module]:
    """The module and everything of ours that importing it imports, packages' __init__ included."""
    seen: dict[str, Module] = {}
    waiting = [start.name]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen[name] = modules[name]
        for imported in (start.name, *(found.name for found in modules[name].imports)):
            parts = imported.split(".")
            waiting += [".".join(parts[: count + 1]) for count in range(len(parts))]
    return list(seen.values())
