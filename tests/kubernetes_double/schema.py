"""Schemas of custom resources: fields that nobody knows are dropped, defaults filled in, the rest
validated, as the API server does with a structural schema. Rules in CEL are not evaluated."""

import copy
from collections.abc import Mapping
from typing import Any

import jsonschema

IDENTITY = ("apiVersion", "kind", "metadata")
NESTED = ("items", "additionalProperties", "not")
LISTED = ("allOf", "anyOf", "oneOf")


class Structural:
    """One version's openAPIV3Schema."""

    def __init__(self, open_api: Mapping[str, Any]) -> None:
        schema = dict(open_api)
        properties = schema.get("properties", {})
        schema["properties"] = {k: v for k, v in properties.items() if k not in IDENTITY}
        self._schema = schema
        self._validator = jsonschema.Draft202012Validator(json_schema(schema))

    def admit(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The object as it is stored, and what is wrong with it."""
        identity = {key: body[key] for key in IDENTITY if key in body}
        rest = {key: value for key, value in body.items() if key not in IDENTITY}
        admitted = defaulted(self._schema, rest)
        wrong = [
            f"{'.'.join(map(str, error.absolute_path)) or '<root>'}: {error.message[:200]}"
            for error in self._validator.iter_errors(admitted)
        ]
        return {**identity, **admitted}, wrong[:5]


def json_schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON Schema."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key.startswith("x-kubernetes-") or key in ("description", "example", "default"):
            continue
        if key == "properties":
            out[key] = {name: json_schema(below) for name, below in value.items()}
        elif key in NESTED and isinstance(value, Mapping):
            out[key] = json_schema(value)
        elif key in LISTED:
            out[key] = [json_schema(below) for below in value]
        else:
            out[key] = value
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if node.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def defaulted(node: Mapping[str, Any], value: Any) -> Any:
    """The value without unknown fields and nulls, with defaults."""
    if isinstance(value, list):
        items = node.get("items")
        return [defaulted(items, each) for each in value] if isinstance(items, Mapping) else value
    if not isinstance(value, dict):
        return value
    properties, others = node.get("properties") or {}, node.get("additionalProperties")
    keeps = node.get("x-kubernetes-preserve-unknown-fields") or others is True or not properties
    out = {}
    for key, below in value.items():
        if below is None and not properties.get(key, {}).get("nullable"):
            continue
        if key in properties:
            out[key] = defaulted(properties[key], below)
        elif isinstance(others, Mapping):
            out[key] = defaulted(others, below)
        elif keeps or (node.get("x-kubernetes-embedded-resource") and key in IDENTITY):
            out[key] = below
    for key, below in properties.items():
        if key not in out and "default" in below:
            out[key] = defaulted(below, copy.deepcopy(below["default"]))
    return out
