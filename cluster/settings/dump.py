"""Settings back to TOML text: complete, commented, and read again to equal settings.

`sanderling up --dry-run` prints it; it is also the reference of what can be set.
"""

import json
from collections.abc import Mapping
from typing import Any

from cluster.settings.catalog import KNOWN, accepts
from cluster.settings.losses import quality_cost
from cluster.settings.sections import Settings


def to_toml(settings: Settings, origins: Mapping[str, str]) -> str:
    """Every setting with its description above it and the origin of each given value beside it."""
    lines: list[str] = []
    open_section = ""
    for name, field in KNOWN.items():
        section, _, key = name.rpartition(".")
        if section != open_section:
            lines += ["", f"[{section}]"]
            open_section = section
        origin = f"  # from {_one_line(origins[name])}" if name in origins else ""
        lines.append(f"# {field.description} Takes {accepts(field)}.")
        lines.append(f"{key} = {_value(_get(settings, name))}{origin}")
    cost = quality_cost(settings)
    lines += ["", f"# In quality: {_one_line(cost)}"] if cost else []
    return "\n".join(lines) + "\n"


def _get(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(k)} = {_value(v)}" for k, v in value.items()) + " }"
    assert isinstance(value, int | float), f"no TOML form for {value!r}"
    return repr(value)


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
