"""The chart as text: rendered by a real Helm, read again as documents."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helm.tools import Tools

Body = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sanderling"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
FILES = {"defaults": (), **{path.stem: (f"--values={path}",) for path in EXAMPLES}}
# The Prometheus operator's, whose definitions are not at hand: only their frame is looked at.
UNSCHEMED = ("ServiceMonitor", "PodMonitor", "PrometheusRule")
VERSIONS = ("1.29.0", "1.37.0")
MAJORS = (3, 4)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
POD_TEMPLATES = ("headGroupSpec", "workerGroupSpecs")


class Helm:
    """One major of Helm with folders of its own, and the cluster of a kubeconfig if it is given."""

    def __init__(
        self, tools: Tools, major: int, folder: Path, kubeconfig: Path | None = None
    ) -> None:
        self.major, self._path = major, tools.helm(major)
        names = ("CACHE", "CONFIG", "DATA")
        homes = {f"HELM_{name}_HOME": str(folder / f"helm{major}-{name}") for name in names}
        nowhere = folder / "nowhere"
        self._environment = {**os.environ, **homes, "KUBECONFIG": str(kubeconfig or nowhere)}

    def try_(self, *arguments: str, timeout_s: float = 280.0) -> "subprocess.CompletedProcess[str]":
        """Whatever it answers."""
        command = [str(self._path), *arguments]
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=timeout_s
        )

    def run(self, *arguments: str, timeout_s: float = 280.0) -> str:
        """What it prints; it has to succeed."""
        answer = self.try_(*arguments, timeout_s=timeout_s)
        assert answer.returncode == 0, f"helm {self.major} {arguments}:\n{answer.stderr}"
        return answer.stdout

    def template(self, *arguments: str) -> str:
        """The chart rendered as release `x` in namespace `models`."""
        return self.run("template", "x", str(CHART), "--namespace", "models", *arguments)

    def refuse(self, *arguments: str) -> str:
        """What it says when it does not render the chart."""
        answer = self.try_("template", "x", str(CHART), "--namespace", "models", *arguments)
        assert answer.returncode != 0, f"helm {self.major} took {arguments}"
        return answer.stderr


def documents(text: str) -> list[Body]:
    """The objects of a rendered chart."""
    return [document for document in yaml.load_all(text, LOADER) if document]


def of(objects: list[Body], kind: str, name: str = "") -> Body:
    """The one object of a kind (and a name)."""
    found = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def settings_text(objects: list[Body]) -> str:
    """The one settings file."""
    return str(of(objects, "ConfigMap", "x-sanderling-settings")["data"]["sanderling.toml"])


def training_job(objects: list[Body]) -> list[Body]:
    """The RayJob that is kept as a text, if there is one."""
    kept = [o["data"].get("rayjob.yaml") for o in objects if o["kind"] == "ConfigMap"]
    return [yaml.safe_load(text) for text in kept if text]


def pods(objects: list[Body]) -> Iterator[tuple[str, Body]]:
    """Every pod template and pod of the chart with a name for it: Deployments', Ray clusters'."""
    for body in [*objects, *training_job(objects)]:
        kind, spec = body["kind"], body.get("spec", {})
        name = body["metadata"].get("name", body["metadata"].get("generateName"))
        if kind == "Pod":
            yield f"{kind} {name}", body
        elif kind == "Deployment":
            yield f"{kind} {name}", spec["template"]
        for cluster in _clusters(kind, spec):
            yield f"{kind} {name} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{kind} {name} {group['groupName']}", group["template"]


def _clusters(kind: str, spec: Body) -> list[Body]:
    if kind == "RayCluster":
        return [spec]
    return [spec[name] for name in ("rayClusterConfig", "rayClusterSpec") if name in spec]


def containers(pod: Body) -> list[Body]:
    """All of them, those that run first included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def groups(objects: list[Body]) -> Mapping[str, Body]:
    """Worker groups of the RayService by name."""
    found = of(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in found}
