"""The Dockerfile says what the chart and the packages say; no Docker is needed to see it."""

import re
import subprocess
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from serve.places import MACHINE_LABEL
from tests.helm.chart import CHART, Body, groups
from tests.house.imports import OURS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def stages(text: str) -> dict[str, str]:
    """Each stage's instructions by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_the_charts_user(target: str):
    found = stages(DOCKERFILE)
    users = re.findall(r"^USER (\S+)$", found["run"] + found[target], re.MULTILINE)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    uid = values["podSecurityContext"]["runAsUser"]
    assert users[-1] == f"{uid}:{values['podSecurityContext']['runAsGroup']}"
    assert f"--uid {uid}" in found["run"]


def test_packages_are_pinned_and_extras_exist():
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) >= 4
    for line in installs:
        assert "-c constraints.txt" in line or re.search(r"--no-deps \S+==\S+", line), line
    listed = re.findall(r"-e \"\.\[([a-z0-9,]+)\]", DOCKERFILE)
    named = {extra for each in listed for extra in each.split(",")}
    assert named <= set(PROJECT["optional-dependencies"]) and "kubernetes" in named


def test_kernels_are_built_before_anything_runs():
    for stage in ("build-cpu", "build-cuda"):
        assert "kernels.cpu.build" in stages(DOCKERFILE)[stage]
    assert "g++" not in stages(DOCKERFILE)["run"]


def test_the_image_is_the_charts_version():
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert version == PROJECT["version"]
    assert f"sanderling:{version}-cpu" in DOCKERFILE and f"sanderling:{version}-cuda" in DOCKERFILE


def test_only_the_program_is_copied():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and set(OURS) <= kept
    assert kept <= {*OURS, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    dropped = [line for line in lines if line.startswith("**/")]
    for secret in ("kernels/cpu/native.so", "serve/__pycache__"):
        assert any(fnmatch(secret, pattern) for pattern in dropped), secret


def test_ray_reads_the_labels_that_a_pod_writes(rendered: Mapping[str, list[Body]], tmp_path: Path):
    """The init container's own command, and Ray's own reader of the file."""
    from ray._private.label_utils import parse_node_labels_from_yaml_file

    for name, group in groups(rendered["a10g-spot"]).items():
        (container,) = group["template"]["spec"]["initContainers"]
        shell, flag, command = container["command"]
        file = tmp_path / f"{name}.yaml"
        path = group["rayStartParams"]["labels-file"]
        assert path in command
        environment = {"POD_NAME": "x-a10g-worker-abcde", "PATH": "/bin:/usr/bin"}
        subprocess.run([shell, flag, command.replace(path, str(file))], env=environment, check=True)
        labels = parse_node_labels_from_yaml_file(str(file))
        assert labels == {MACHINE_LABEL: "x-a10g-worker-abcde"}


def test_the_charts_commands_exist():
    """`sanderling autoscale`, the RayService's import path and the preStop module."""
    import importlib

    from cluster.cli import COMMANDS

    assert "autoscale" in COMMANDS and PROJECT["scripts"]["sanderling"] == "cluster.cli:main"
    module, _, name = "serve.rayservice:application".partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert importlib.import_module("serve.leaving").leaving.params
    assert "serve.rayservice:application" in (CHART / "templates" / "rayservice.yaml").read_text()
