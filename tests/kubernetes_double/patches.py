"""Patches, and who owns which field.

Server-side apply is done over leaves: a list is one leaf (as it is where a schema says "atomic", as
RayCluster's workerGroupSpecs does), also where the real server would merge by a key.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Path = tuple[str, ...]
UNOWNED = ("metadata", "apiVersion", "kind", "status")
OWNED_METADATA = ("labels", "annotations", "finalizers")
# How strategic patches tell the entries of a list apart; lists that are not here are replaced, as a
# node's taints are.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "conditions": "type",
    "imagePullSecrets": "name",
    "addresses": "type",
}


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    out = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out


def strategic(old: Any, patch: Any, name: str = "") -> Any:
    """kubectl's patch of built-in kinds."""
    if isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {key: value for key, value in patch.items() if key != "$patch"}
        out = dict(old) if isinstance(old, dict) else {}
        for key, value in patch.items():
            if key.startswith("$"):
                continue
            if value is None:
                out.pop(key, None)
            else:
                out[key] = strategic(out.get(key), value, key)
        return out
    key = MERGE_KEYS.get(name)
    if not isinstance(patch, list) or key is None or not isinstance(old, list):
        return patch
    return _merged_list(old, patch, key)


def _merged_list(old: list[Any], patch: list[Any], key: str) -> list[Any]:
    out = [dict(each) for each in old]
    for each in patch:
        places = [i for i, there in enumerate(out) if there.get(key) == each.get(key)]
        if each.get("$patch") == "delete":
            for place in places:
                out.pop(place)
        elif places:
            out[places[0]] = strategic(out[places[0]], each)
        else:
            out.append(each)
    return out


def leaves(body: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths of what is no table, or an empty one."""
    if isinstance(body, dict) and body:
        for key, value in body.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, body


def owned(body: Mapping[str, Any]) -> dict[Path, str]:
    """Every field that somebody can own, and its value as text."""
    parts = {key: value for key, value in body.items() if key not in UNOWNED}
    metadata = body.get("metadata") or {}
    some = {key: metadata[key] for key in OWNED_METADATA if metadata.get(key)}
    if some:
        parts["metadata"] = some
    return {path: json.dumps(value, sort_keys=True) for path, value in leaves(parts) if path}


def without(body: dict[str, Any], paths: Iterable[Path]) -> dict[str, Any]:
    """The body less some fields."""
    for path in paths:
        place: Any = body
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(path[-1], None)
    return body


def managed_fields(
    owners: Mapping[Path, str], version: str, time: str, applied: Iterable[str]
) -> list[dict[str, Any]]:
    """metadata.managedFields."""
    by_manager: dict[str, dict[str, Any]] = {}
    for path, manager in owners.items():
        place = by_manager.setdefault(manager, {})
        for key in path:
            place = place.setdefault(f"f:{key}", {})
    operations = dict.fromkeys(applied, "Apply")
    return [
        {
            "manager": manager,
            "operation": operations.get(manager, "Update"),
            "apiVersion": version,
            "time": time,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        }
        for manager, fields in sorted(by_manager.items())
    ]
