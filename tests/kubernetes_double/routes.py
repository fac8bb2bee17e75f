"""From a request to an answer: which resource, which verb, and the store's word on it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jsonpatch

from tests.kubernetes_double import discovery, evictions, patches, rbac, watching
from tests.kubernetes_double.faults import Faults
from tests.kubernetes_double.kinds import ApiError, api_version, no_resource, success
from tests.kubernetes_double.rbac import Attempt
from tests.kubernetes_double.selectors import fields_match, labels_match
from tests.kubernetes_double.store import At, How, Store

Body = dict[str, Any]
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_RESOURCE = re.compile(r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]*)/(?P<rest>.+)$")
_GROUP = re.compile(r"^/apis/([^/]+)$")
_VERSION = re.compile(r"^/(?:api|apis/([^/]+))/(v[^/]*)$")
HEALTH = ("/healthz", "/readyz", "/livez")
SPLIT = ("status", "finalize")


@dataclass(frozen=True)
class Request:
    """kind: Content-Type without its parameters. agent: the client's name for itself."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    kind: str
    accept: str
    agent: str


@dataclass(frozen=True)
class Answer:
    """stream: lines of a watch, instead of a body."""

    code: int
    body: Any
    stream: Iterator[bytes] | None = None
    retry_after_s: int | None = None


def place(request: Request) -> At | None:
    """The resource that is asked for; None for discovery and health."""
    found = _RESOURCE.match(request.path)
    if not found:
        return None
    parts, namespace = found["rest"].split("/"), None
    if parts[0] == "namespaces" and len(parts) > 2 and parts[2] not in SPLIT:
        namespace, parts = parts[1], parts[2:]
    resource, name, sub, *_ = [*parts, "", "", ""]
    return At(found["group"] or "", found["version"], resource, namespace, name, sub)


def attempt_of(store: Store, request: Request, user: str) -> Attempt | None:
    """The request as the authorizer sees it; None for discovery and health."""
    at = place(request)
    if at is None:
        return None
    resource = f"{at.resource}/{at.sub}" if at.sub else at.resource
    return Attempt(user, _verb(request, at), at.group, resource, at.namespace, at.name)


def _verb(request: Request, at: At) -> str:
    if request.method == "GET":
        if watching.truth(request.query.get("watch")):
            return "watch"
        return "get" if at.name else "list"
    if request.method == "DELETE" and not at.name:
        return "deletecollection"
    return VERBS[request.method]


def respond(
    store: Store, version: str, request: Request, faults: Faults, attempt: Attempt | None
) -> Answer:
    """The answer. ApiError where it is no."""
    at = place(request)
    if at is None or attempt is None:
        return Answer(200, _known(store, version, request.path))
    kind = store.kind(at)
    if at.sub and at.sub not in kind.subresources:
        raise no_resource()
    if at.resource.endswith("accessreviews"):
        return Answer(201, _reviewed(store, request.body, attempt.user))
    calls: Mapping[str, Callable[[], Answer]] = {
        "get": lambda: Answer(200, store.get(at)),
        "list": lambda: _list(store, at, request),
        "watch": lambda: _watch(store, at, request, faults),
        "create": lambda: _create(store, at, request),
        "update": lambda: Answer(200, _update(store, at, request)),
        "patch": lambda: _patch(store, at, request),
        "delete": lambda: _delete(store, at, request),
        "deletecollection": lambda: _delete_all(store, at, request),
    }
    return calls[attempt.verb]()


def _known(store: Store, version: str, path: str) -> Any:
    if path == "/version":
        return discovery.version_of(version)
    if path in HEALTH:
        return b"ok"
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": discovery.groups(store)}
    if path.startswith("/openapi/"):
        return discovery.open_api(store, version, path)
    group = _GROUP.match(path)
    for each in discovery.groups(store):
        if group and each["name"] == group[1]:
            return {"kind": "APIGroup", "apiVersion": "v1", **each}
    found = _VERSION.match(path)
    if found and (found[1] or "", found[2]) in store.api:
        return discovery.resources(store, found[1] or "", found[2])
    raise no_resource()


def _reviewed(store: Store, body: Body, user: str) -> Body:
    spec = body.get("spec") or {}
    asked = spec.get("resourceAttributes") or {}
    resource = "/".join(filter(None, (asked.get("resource"), asked.get("subresource"))))
    attempt = Attempt(
        spec.get("user", user),
        asked.get("verb", ""),
        asked.get("group", ""),
        resource,
        asked.get("namespace") or None,
        asked.get("name", ""),
    )
    return {**body, "status": {"allowed": rbac.allowed(store, attempt)}}


def _how(request: Request) -> How:
    query, body = request.query, request.body if isinstance(request.body, dict) else {}
    options = body.get("deleteOptions") or body
    dry = query.get("dryRun") == "All" or options.get("dryRun") == ["All"]
    grace = query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
    policy = query.get("propagationPolicy", options.get("propagationPolicy"))
    guard = options.get("preconditions") or {}
    return How(
        query.get("fieldManager") or request.agent,
        dry,
        watching.truth(query.get("force")),
        None if grace is None else int(grace),
        policy == "Orphan",
        guard.get("uid"),
        guard.get("resourceVersion"),
    )


def _fits(request: Request, at: At) -> Callable[[Body], bool]:
    query = request.query
    fields = f"metadata.name={at.name}" if at.name else query.get("fieldSelector")

    def fits(body: Body) -> bool:
        labels = body["metadata"].get("labels") or {}
        return labels_match(query.get("labelSelector"), labels) and fields_match(fields, body)

    return fits


def _list(store: Store, at: At, request: Request) -> Answer:
    items, version = store.list(at, _fits(request, at))
    first, many = int(request.query.get("continue") or 0), int(request.query.get("limit") or 0)
    metadata: Body = {"resourceVersion": str(version)}
    if many and len(items) > first + many:
        left = len(items) - first - many
        metadata |= {"continue": str(first + many), "remainingItemCount": left}
    items = items[first : first + many] if many else items
    if "as=Table" in request.accept:
        return Answer(200, _table(items, metadata))
    about = {"kind": f"{store.kind(at).kind}List", "apiVersion": api_version(at.group, at.version)}
    return Answer(200, {**about, "metadata": metadata, "items": items})


def _table(items: list[Body], metadata: Body) -> Body:
    """What kubectl prints: only names and ages."""
    columns = [
        {"name": name, "type": "string", "format": "", "description": "", "priority": 0}
        for name in ("Name", "Age")
    ]
    part = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
    rows = [
        {
            "cells": [item["metadata"]["name"], item["metadata"]["creationTimestamp"]],
            "object": {**part, "metadata": item["metadata"]},
        }
        for item in items
    ]
    about = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
    return {**about, "columnDefinitions": columns, "rows": rows}


def _watch(store: Store, at: At, request: Request, faults: Faults) -> Answer:
    collection = replace(at, name="")
    lines = watching.events(store, collection, request.query, _fits(request, at), faults)
    return Answer(200, None, lines)


def _create(store: Store, at: At, request: Request) -> Answer:
    if at.sub == "eviction":
        evictions.evict(store, at, _how(request))
        return Answer(201, success())
    if at.sub:
        raise ApiError(405, "MethodNotAllowed", f"{at.sub} takes no POST here")
    return Answer(201, store.create(at, request.body, _how(request)))


def _update(store: Store, at: At, request: Request) -> Body:
    return store.update(at, lambda _: request.body, _how(request))


def _patch(store: Store, at: At, request: Request) -> Answer:
    how, patch = _how(request), request.body
    if request.kind == "application/apply-patch+yaml":
        body, made = store.apply(at, patch, how)
        return Answer(201 if made else 200, body)
    ways: Mapping[str, Callable[[Body], Any]] = {
        "application/json-patch+json": lambda old: _json_patched(old, patch),
        "application/merge-patch+json": lambda old: patches.merged(old, _table_only(patch)),
        "application/strategic-merge-patch+json": lambda old: patches.strategic(old, patch),
    }
    if request.kind not in ways or ("strategic" in request.kind and store.has_schema(at)):
        said = f"the body of the request was in an unknown format: {request.kind}"
        raise ApiError(415, "UnsupportedMediaType", said)
    return Answer(200, store.update(at, ways[request.kind], how))


def _json_patched(old: Body, patch: Any) -> Any:
    try:
        return jsonpatch.apply_patch(old, patch)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
        raise ApiError(422, "Invalid", f"the server rejected our request: {error}") from None


def _table_only(patch: Any) -> Body:
    if not isinstance(patch, dict):
        raise ApiError(422, "Invalid", "a merge patch is an object")
    return patch


def _delete(store: Store, at: At, request: Request) -> Answer:
    body = store.delete(at, _how(request))
    kept = at.resource == "pods" or body["metadata"].get("deletionTimestamp")
    return Answer(200, body if kept else success())


def _delete_all(store: Store, at: At, request: Request) -> Answer:
    for body in store.list(at, _fits(request, at))[0]:
        metadata = body["metadata"]
        one = replace(at, name=metadata["name"], namespace=metadata.get("namespace"))
        store.delete(one, _how(request))
    return Answer(200, success())
