"""checkov over the rendered chart, Ray's pod templates included; see test_checkov.py.

It pins packages of ours to old versions, so it lives in an environment of its own,
$SANDERLING_CHECKOV or ~/.cache/sanderling-oracles/checkov:

    python3.11 -m venv ~/.cache/sanderling-oracles/checkov
    ~/.cache/sanderling-oracles/checkov/bin/pip install checkov==3.3.30
"""

import copy
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.helm.chart import Body, pods

# What a check asks for, and why the chart does otherwise. At most five.
ALLOWED: Mapping[str, str] = {
    "CKV_K8S_15": "always pulling an image of a fixed tag or digest costs gigabytes for each GPU "
    "pod, and minutes of a replacement; the policy is a value",
    "CKV_K8S_43": "digests are values (images.*.digest): images are built by whoever installs",
    "CKV_K8S_38": "the controller's work is to talk to the API, and so is that of Ray's autoscaler "
    "in the head; no other pod has a token",
    "CKV_K8S_8": "the pod of `helm test` asks once and ends; that it ended well is its liveness",
    "CKV_K8S_9": "the pod of `helm test` takes no traffic, so nobody waits for its readiness",
}


class Verdict(NamedTuple):
    """How many checks passed, and what failed: "CKV_K8S_1 Pod.models.x"."""

    passed: int
    failed: tuple[str, ...]

    @property
    def unexplained(self) -> tuple[str, ...]:
        return tuple(each for each in self.failed if each.split()[0] not in ALLOWED)


def program() -> Path:
    """checkov, or a skipped test."""
    default = Path.home() / ".cache" / "sanderling-oracles" / "checkov"
    path = Path(os.environ.get("SANDERLING_CHECKOV", default)) / "bin" / "checkov"
    if not path.is_file():
        pytest.skip(f"no checkov at {path} (tests/helm/checks.py says how to install it)")
    return path


def as_pods(objects: list[Body]) -> list[Body]:
    """Pod templates of ray.io's objects as Pods, since checkov knows none of those objects."""
    found = []
    for where, template in pods(objects):
        if not where.startswith("Ray"):
            continue
        body = copy.deepcopy({"apiVersion": "v1", "kind": "Pod", **template})
        name = where.lower().replace(" ", "-").strip("-")
        body["metadata"] = {**body["metadata"], "name": name, "namespace": "models"}
        found.append(body)
    return found


def judge(objects: list[Body], folder: Path) -> Verdict:
    """What checkov says of these objects."""
    kept = [b for b in objects if not b["apiVersion"].startswith(("ray.io/", "monitoring."))]
    file = folder / "rendered.yaml"
    file.write_text(yaml.safe_dump_all([*kept, *as_pods(objects)]), encoding="utf-8")
    command = [str(program()), "-f", str(file), "--framework", "kubernetes", "--compact"]
    command += ["--quiet", "--skip-download", "-o", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert answer.returncode in (0, 1), answer.stderr
    said = json.loads(answer.stdout)
    failed = [f"{c['check_id']} {c['resource']}" for c in said["results"]["failed_checks"]]
    return Verdict(said["summary"]["passed"], tuple(sorted(failed)))
