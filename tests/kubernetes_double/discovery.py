"""What clients ask before they do anything: versions, groups, resources, OpenAPI (only as much
of it as kubectl and helm read)."""

from typing import Any

from tests.kubernetes_double.kinds import Kind, api_version, no_resource
from tests.kubernetes_double.store import Store

Body = dict[str, Any]
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
WRITES = ("patch", "put", "get")


def version_of(version: str) -> Body:
    """GET /version."""
    major, minor, *_ = version.lstrip("v").split(".")
    return {
        "major": major,
        "minor": minor,
        "gitVersion": version,
        "gitCommit": "double",
        "gitTreeState": "clean",
        "buildDate": "2026-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "none",
        "platform": "linux/amd64",
    }


def groups(store: Store) -> list[Body]:
    """Every group but the core's, with its versions."""
    versions: dict[str, list[str]] = {}
    for group, version in store.api:
        if group:
            versions.setdefault(group, []).append(version)
    return [
        {
            "name": group,
            "versions": [_named(group, version) for version in known],
            "preferredVersion": _named(group, known[0]),
        }
        for group, known in versions.items()
    ]


def _named(group: str, version: str) -> Body:
    return {"groupVersion": f"{group}/{version}", "version": version}


def resources(store: Store, group: str, version: str) -> Body:
    """What one version of a group has."""
    listed: list[Body] = []
    for name, kind in store.api[group, version].items():
        about = {"namespaced": kind.namespaced, "singularName": ""}
        entry = {"name": name, "kind": kind.kind, "verbs": VERBS, "shortNames": list(kind.short)}
        listed.append({**about, **entry, "singularName": kind.kind.lower()})
        listed += [{**about, **_subresource(name, sub, kind)} for sub in kind.subresources]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": api_version(group, version),
        "resources": listed,
    }


def _subresource(name: str, sub: str, kind: Kind) -> Body:
    entry: Body = {
        "name": f"{name}/{sub}",
        "kind": kind.kind,
        "verbs": ["get", "patch", "update"],
    }
    if sub == "eviction":  # kubectl drain looks for exactly this
        entry |= {"kind": "Eviction", "group": "policy", "version": "v1", "verbs": ["create"]}
    if sub == "scale":
        entry |= {"kind": "Scale", "group": "autoscaling", "version": "v1"}
    return entry


def open_api(store: Store, version: str, path: str) -> Body:
    """/openapi/v2, /openapi/v3 and its documents. Schemas are empty: nothing is checked by them."""
    info = {"title": "double", "version": version}
    if path == "/openapi/v2":
        return {"swagger": "2.0", "info": info, "paths": {}, "definitions": {}}
    places = {_place(group, of): (group, of) for group, of in store.api}
    if path == "/openapi/v3":
        return {"paths": {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in places}}
    place = path.removeprefix("/openapi/v3/")
    if place not in places:
        raise no_resource()
    group, of = places[place]
    paths = {}
    for name, kind in store.api[group, of].items():
        inside = "/namespaces/{namespace}" if kind.namespaced else ""
        about = {"group": group, "version": of, "kind": kind.kind}
        operation = {
            "x-kubernetes-group-version-kind": about,
            "parameters": [_parameter("fieldValidation"), _parameter("dryRun")],
            "responses": {},
        }
        paths[f"/{place}{inside}/{name}/{{name}}"] = dict.fromkeys(WRITES, operation)
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


def _place(group: str, version: str) -> str:
    return f"apis/{group}/{version}" if group else "api/v1"


def _parameter(name: str) -> Body:
    return {"name": name, "in": "query", "schema": {"type": "string"}}
