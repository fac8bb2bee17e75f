"""values.schema.json as data: every value of the chart with its type, bounds and a sentence.

Strict everywhere but where an object of Kubernetes stands (an affinity, a volume), which the
cluster checks. `settings` is made from the settings of the program, GPU kinds from the catalogue,
so neither is written down twice. `python -m helm.generate` writes the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cluster.settings.catalog import KNOWN

Schema = dict[str, Any]

ROOT = Path(__file__).parents[1]
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
# What the chart derives itself, and what would be a secret in plain sight.
DERIVED = {
    *("data_dir", "http.host", "http.port", "http.proxy", "http.api_key", "http.api_keys_file"),
    *("http.machines_key", "autoscale.service_key_file"),
    *("ray.address", "ray.auth", "ray.object_store_bytes", "handoff.transport"),
    *("prefill.cpus", "prefill.labels", "decode.cpus", "decode.labels"),
    *("autoscale.prefill.floor", "autoscale.prefill.cap", "autoscale.prefill.on_demand"),
    *("autoscale.decode.floor", "autoscale.decode.cap", "autoscale.decode.on_demand"),
    *("autoscale.provider", "autoscale.service_url", "autoscale.health_port"),
    *("autoscale.kubernetes.kubeconfig", "autoscale.kubernetes.namespace"),
    *("autoscale.kubernetes.service", "autoscale.kubernetes.lease"),
}


def text(said: str, **rules: Any) -> Schema:
    return {"type": "string", "description": said, **rules}


def integer(said: str, least: int, most: int) -> Schema:
    return {"type": "integer", "description": said, "minimum": least, "maximum": most}


def number(said: str, least: float) -> Schema:
    return {"type": "number", "description": said, "minimum": least}


def flag(said: str) -> Schema:
    return {"type": "boolean", "description": said}


def choice(said: str, *accepted: str) -> Schema:
    return {"type": "string", "description": said, "enum": list(accepted)}


def table(said: str, properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """An object that takes these names and no other."""
    schema: Schema = {"type": "object", "description": said, "additionalProperties": False}
    if required:
        schema["required"] = list(required)
    return {**schema, "properties": dict(properties)}


def texts(said: str) -> Schema:
    """Labels, annotations: names and texts."""
    return {"type": "object", "description": said, "additionalProperties": {"type": "string"}}


def foreign(said: str) -> Schema:
    """An object of Kubernetes' own, which the cluster checks."""
    return {"type": "object", "description": said}


def foreign_list(said: str) -> Schema:
    return {"type": "array", "description": said, "items": {"type": "object"}}


def kinds() -> list[str]:
    """GPU kinds of the catalogue, by its data sheets."""
    return sorted(path.stem for path in (ROOT / "autoscale/catalog/data_sheets").glob("*.toml"))


def settings() -> Schema:
    """The settings that values may give, as a tree of tables."""
    tree: Schema = table("Settings of sanderling.toml; what the chart derives is not accepted.", {})
    for name, field in KNOWN.items():
        if name in DERIVED:
            continue
        *sections, key = name.split(".")
        inner = tree
        for section in sections:
            made = table(f"The table [{'.'.join(sections)}] of the settings.", {})
            inner = inner["properties"].setdefault(section, made)
        inner["properties"][key] = _setting(field)
    return tree


def _setting(field: FieldInfo) -> Schema:
    kind, schema = field.annotation, {"description": field.description or ""}
    if get_origin(kind) is Literal:
        return {"type": "string", **schema, "enum": list(get_args(kind))}
    if get_origin(kind) is dict:
        return {"type": "object", **schema, "additionalProperties": {"type": "string"}}
    names: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": names[kind], **schema, **_bounds(field)}


def _bounds(field: FieldInfo) -> Schema:
    words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    words |= {"min_length": "minLength", "max_length": "maxLength", "pattern": "pattern"}
    found = {}
    for rule in field.metadata:
        for name, word in words.items():
            value = getattr(rule, name, None)
            if value is not None:
                found[word] = value
    return found


def resources(said: str) -> Schema:
    amounts: Schema = {
        "type": "object",
        "additionalProperties": {"type": "string", "pattern": QUANTITY},
        "required": ["cpu", "memory"],
    }
    return table(
        said,
        {
            "requests": {**amounts, "description": "What is reserved."},
            "limits": {**amounts, "description": "What it may use at most."},
        },
        ("requests", "limits"),
    )


def image(which: str) -> Schema:
    return table(
        f"The image for {which}.",
        {
            "registry": text("Registry; global.imageRegistry wins over it."),
            "repository": text("Repository."),
            "tag": text("Tag; empty: the chart's appVersion and the image's name."),
            "digest": text("Digest; wins over the tag.", pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": choice("When it is pulled.", "IfNotPresent", "Always", "Never"),
        },
        ("repository",),
    )


def secret(said: str, key: str) -> Schema:
    return table(said, {"existingSecret": text("Name of the Secret."), "key": text(key)})


def pod(of: str) -> dict[str, Schema]:
    """What every kind of pod takes."""
    return {
        "resources": resources(f"CPU, memory and disk of {of}."),
        "nodeSelector": texts("Labels that its node must have."),
        "tolerations": foreign_list("Taints that it tolerates, besides those that follow."),
        "affinity": foreign("Replaces the affinity that keeps it on or off spot nodes."),
        "priorityClassName": text("Its priority class; empty: of priorityClasses, or none."),
        "podLabels": texts("More labels of the pod."),
        "podAnnotations": texts("More annotations of the pod."),
        "extraEnv": foreign_list("More variables."),
        "extraEnvFrom": foreign_list("More variables from Secrets and ConfigMaps."),
        "extraVolumes": foreign_list("More volumes."),
        "extraVolumeMounts": foreign_list("Where they are mounted."),
    }


def ray_pod(of: str) -> dict[str, Schema]:
    most = 1 << 40
    return {
        **pod(of),
        "sharedMemory": text("Size of /dev/shm, out of its memory.", pattern=QUANTITY),
        "objectStoreBytes": integer("Ray's object store, in /dev/shm.", 75 << 20, most),
    }


def spread() -> dict[str, Schema]:
    properties = {
        "enabled": flag("Whether its pods are spread."),
        "topologyKey": text("Over what."),
        "maxSkew": integer("How uneven it may be.", 1, 100),
        "whenUnsatisfiable": choice("If it cannot be.", "ScheduleAnyway", "DoNotSchedule"),
    }
    return {"topologySpread": table("Spreads pods over zones or machines.", properties)}
