"""Definitions of RayCluster and RayService that hold what the tests of the provider need: our own,
small and quick. With KubeRay's own (1.7) beside the repository, `kuberay()` gives those."""

import gzip
import json
from pathlib import Path
from typing import Any

Body = dict[str, Any]
DATA = Path(__file__).parents[3] / "shared" / "data" / "kuberay"
TEXT, WHOLE = {"type": "string"}, {"type": "integer", "format": "int32"}
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
GROUP: Body = {
    "type": "object",
    "required": ["groupName", "template", "minReplicas", "maxReplicas"],
    "properties": {
        "groupName": TEXT,
        "replicas": {**WHOLE, "default": 0},
        "minReplicas": {**WHOLE, "default": 0},
        "maxReplicas": {**WHOLE, "default": 2147483647},
        "labels": {"type": "object", "additionalProperties": TEXT},
        "rayStartParams": {"type": "object", "additionalProperties": TEXT},
        "scaleStrategy": {
            "type": "object",
            "properties": {"workersToDelete": {"type": "array", "items": TEXT}},
        },
        "template": ANYTHING,
    },
}
CLUSTER: Body = {
    "type": "object",
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": TEXT,
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "properties": {"template": ANYTHING},
        },
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
}
SERVICE: Body = {
    "type": "object",
    "properties": {"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER},
}


def small() -> list[Body]:
    """Our own."""
    return [_definition("RayCluster", CLUSTER), _definition("RayService", SERVICE)]


def kuberay() -> list[Body] | None:
    """KubeRay's; None where they are not there."""
    files = sorted(DATA.glob("ray.io_*.json.gz"))
    return [json.loads(gzip.decompress(file.read_bytes())) for file in files] or None


def _definition(kind: str, spec: Body) -> Body:
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "properties": {"spec": spec, "status": ANYTHING}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.ray.io"},
        "spec": {
            "group": "ray.io",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }
