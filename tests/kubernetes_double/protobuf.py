"""Bodies in protobuf, as kubectl and helm send them for some built-in kinds: enough of the wire
format to read those. The double always answers in JSON, which they accept."""

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from tests.kubernetes_double.kinds import ApiError

MAGIC = b"k8s\0"
Field = tuple[str, str]  # name, and how to read it: a kind, or one of the words below
META: Mapping[int, Field] = {
    1: ("name", "text"),
    2: ("generateName", "text"),
    3: ("namespace", "text"),
    5: ("uid", "text"),
    6: ("resourceVersion", "text"),
    11: ("labels", "table"),
    12: ("annotations", "table"),
    14: ("finalizers", "texts"),
}
ONLY_META: Mapping[int, Field] = {1: ("metadata", "ObjectMeta")}
KINDS: Mapping[str, Mapping[int, Field]] = {
    "ObjectMeta": META,
    "Secret": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "base64 table"),
        3: ("type", "text"),
        4: ("stringData", "table"),
    },
    "ConfigMap": {1: ("metadata", "ObjectMeta"), 2: ("data", "table")},
    "Namespace": ONLY_META,
    "Eviction": ONLY_META,
    "ServiceAccount": ONLY_META,
    "SelfSubjectAccessReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "AccessSpec")},
    "AccessSpec": {
        1: ("resourceAttributes", "ResourceAttributes"),
        2: ("nonResourceAttributes", "NonResourceAttributes"),
    },
    "ResourceAttributes": {
        1: ("namespace", "text"),
        2: ("verb", "text"),
        3: ("group", "text"),
        4: ("version", "text"),
        5: ("resource", "text"),
        6: ("subresource", "text"),
        7: ("name", "text"),
    },
    "NonResourceAttributes": {1: ("path", "text"), 2: ("verb", "text")},
}


def decoded(body: bytes) -> dict[str, Any]:
    """A body that begins with MAGIC (runtime.Unknown around one object)."""
    unknown = dict(_fields(body[len(MAGIC) :]))
    kind_of = dict(_fields(unknown[1]))
    kind, version = kind_of.get(2, b"").decode(), kind_of.get(1, b"").decode()
    if kind == "DeleteOptions":
        return {}
    if kind not in KINDS:
        raise ApiError(415, "UnsupportedMediaType", f"protobuf of {kind} is not read here")
    return {**_message(kind, unknown.get(2, b"")), "apiVersion": version, "kind": kind}


def _fields(body: bytes) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(body):
        tag, place = _varint(body, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(body, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(body, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ApiError(400, "BadRequest", f"protobuf wire type {wire}")
        yield number, body[place : place + size]
        place += size


def _varint(body: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _message(kind: str, body: bytes) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for number, value in _fields(body):
        if number not in KINDS[kind]:
            continue
        name, how = KINDS[kind][number]
        if how == "text":
            if value:
                out[name] = value.decode()
        elif how == "texts":
            out.setdefault(name, []).append(value.decode())
        elif how.endswith("table"):
            entry = dict(_fields(value))
            content = entry.get(2, b"")
            text = base64.b64encode(content) if how.startswith("base64") else content
            out.setdefault(name, {})[entry.get(1, b"").decode()] = text.decode()
        else:
            out[name] = _message(how, value)
    return out
