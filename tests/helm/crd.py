"""KubeRay's definitions as strict JSON Schemas: unknown fields refused, defaults applied first, as
the API server does it. Its CEL rules and what the operator refuses by code are checked apart."""

import copy
import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

Body = dict[str, Any]
DATA = Path(__file__).parents[3] / "shared" / "data" / "kuberay"
RAY = "ray.io/v1"
FIRST_WITH_PRIORITY = (2, 56)


@cache
def definitions() -> Mapping[str, Body]:
    """openAPIV3Schema of ray.io/v1 by kind, or a skipped test."""
    files = sorted(DATA.glob("ray.io_*.json.gz"))
    if not files:
        pytest.skip("KubeRay's definitions are not beside the repository (shared/data/kuberay)")
    found = {}
    for file in files:
        spec = json.loads(gzip.decompress(file.read_bytes()))["spec"]
        for version in spec["versions"]:
            if version["name"] == "v1":
                found[spec["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = _strict(definitions()[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(body: Body) -> list[str]:
    """What the API server and KubeRay's operator would say against an object of ray.io."""
    body = _pruned(body)
    _apply_defaults(definitions()[body["kind"]], body)
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in _validator(body["kind"]).iter_errors(body)
    ]
    spec = body["spec"]
    for cluster in (spec.get("rayClusterConfig"), spec.get("rayClusterSpec"), spec):
        if cluster and "headGroupSpec" in cluster:
            found += operator_refusals(cluster)
    return found


def operator_refusals(cluster: Body) -> list[str]:
    """What KubeRay 1.7 refuses of a cluster though the schema takes it (utils/validation.go)."""
    found = []
    autoscaling = cluster.get("enableInTreeAutoscaling", False)
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]:
        name = group.get("groupName", "head")
        if "labels" in group["rayStartParams"]:
            found.append(f"{name}: rayStartParams.labels is not supported")
        if group.get("priority") and (not autoscaling or version < FIRST_WITH_PRIORITY):
            found.append(f"{name}: a priority needs the autoscaler v2 and Ray 2.56")
        if "idleTimeoutSeconds" in group and not autoscaling:
            found.append(f"{name}: idleTimeoutSeconds needs the autoscaler v2")
        if not autoscaling and name != "head" and not {"minReplicas", "maxReplicas"} <= set(group):
            found.append(f"{name}: needs both minReplicas and maxReplicas")
        if group.get("minReplicas", 0) > group.get("maxReplicas", 1):
            found.append(f"{name}: minReplicas is above maxReplicas")
        if autoscaling and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append(f"{name}: restartPolicy has to be Never")
    return found


def _strict(schema: Body) -> Body:
    made: Body = {}
    for key, value in schema.items():
        if key.startswith("x-kubernetes-") or key in ("description", "default"):
            continue
        if key == "properties":
            made[key] = {name: _strict(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            made[key] = _strict(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            made[key] = [_strict(inner) for inner in value]
        else:
            made[key] = value
    open_ = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_:
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def _apply_defaults(schema: Body, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                _apply_defaults(inner, value[name])
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for inner in value:
            _apply_defaults(schema["items"], inner)
