"""The dependency direction of ARCHITECTURE.md holds, and the checker can see it broken."""

from pathlib import Path

import pytest

from tests.house.imports import OURS, read_tree, violations

ROOT = Path(__file__).parents[2]


def test_direction_holds():
    modules = read_tree(ROOT)
    assert {"cluster", "serve", "kernels", "models"} <= set(modules)
    assert violations(modules) == []


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """A tree with empty packages and the given files; what the checker says of it."""
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in [file.parent, *file.parent.parents]:
            if folder == root:
                break
            (folder / "__init__.py").touch()
        file.write_text(text, encoding="utf-8")
    return violations(read_tree(root))


FORBIDDEN = {
    "cluster imports a domain": {"cluster/cli.py": "import serve.commands"},
    "inside a function": {"cluster/a.py": "def f():\n    from models.load import load_model"},
    "under TYPE_CHECKING": {
        "kernels/a.py": "import typing\nif typing.TYPE_CHECKING:\n    import models.batch"
    },
    "models import serve": {"models/a.py": "from serve import engine"},
    "serve imports train": {"serve/a.py": "from train.step import step"},
    "train imports serve": {"train/a.py": "import serve"},
    "Ray in the engine": {"serve/engine/a.py": "from ray import serve as ray_serve"},
    "HTTP in the pool": {"serve/kv/a.py": "import http.client"},
    "web framework in the engine": {"serve/engine/a.py": "from fastapi import FastAPI"},
    "cloud in autoscale": {"autoscale/loop.py": "import boto3"},
    "triton elsewhere": {"kernels/cpu/a.py": "import triton.language as tl"},
    "Ray's private parts": {"serve/a.py": "from ray._private import state"},
    "Ray beside its place": {"cluster/nodes.py": "import ray"},
    "relative, up and over": {"serve/engine/a.py": "from ...cluster import raylocal"},
    "relative, in the package": {
        "serve/engine/__init__.py": "from .step import step",
        "serve/engine/step.py": "import uvicorn",
    },
    "by a detour": {
        "serve/engine/a.py": "from serve.trace import mark",
        "serve/trace.py": "import ray",
    },
    "by a package's __init__": {"serve/kv/a.py": "", "serve/__init__.py": "import starlette"},
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_checker_sees(name: str, tmp_path: Path):
    found = plant(tmp_path, FORBIDDEN[name])
    assert found, f"not seen: {name}"


ALLOWED = {
    "strings": {"cluster/cli.py": 'UP = "serve.commands:up"'},
    "downwards": {
        "serve/a.py": "import models.batch, kernels, cluster.clock\nfrom ray import serve"
    },
    "Ray in its place": {
        "cluster/raylocal/session.py": "import ray\nfrom ray._private import state"
    },
    "triton in its place": {"kernels/triton/a.py": "import triton"},
    "a like name": {"serve/engine/a.py": "import rays, httpish", "cluster/a.py": "import serves"},
    "our own http, named relatively": {"serve/http.py": "", "serve/a.py": "from . import http"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_checker_lets_pass(name: str, tmp_path: Path):
    assert plant(tmp_path, ALLOWED[name]) == []


def test_every_package_is_known():
    """A new top-level package is a reviewed act: it needs a place in the direction."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders <= set(OURS)
