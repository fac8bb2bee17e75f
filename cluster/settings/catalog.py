"""The settings as a flat catalogue: dotted name -> field, what it accepts, what text means.

Environment and flags carry text, files carry TOML values; both end as the same Python values here.
Used by resolve.py, dump.py and the frozen list of knobs in the tests.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.settings.sections import DEVICE_PATTERN, Settings

ENVIRONMENT_PREFIX = "SANDERLING_"


def is_section(field: FieldInfo) -> bool:
    """True for a table of settings, false for a single value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _walk(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if is_section(field):
            assert isinstance(field.annotation, type)
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


KNOWN: Mapping[str, FieldInfo] = MappingProxyType(dict(_walk(Settings, "")))
"""Every setting by its dotted name, in the order of the file."""


def environment_name(name: str) -> str:
    """`http.port` -> `SANDERLING_HTTP__PORT`."""
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def nearest(name: str, known: Iterable[str] = KNOWN) -> str:
    """The known name most like `name`; one in the same section wins over an equally close one, and
    a name without a section may be that of a section."""
    section = name.rpartition(".")[0]

    def likeness(candidate: str) -> float:
        ratio = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = candidate.rpartition(".")[2]
        tail = difflib.SequenceMatcher(None, name.rpartition(".")[2], last).ratio()
        head = difflib.SequenceMatcher(None, name, candidate.partition(".")[0]).ratio()
        same = bool(section) and candidate.startswith(f"{section}.")
        return max(ratio, tail - 0.05, 0.0 if section else head - 0.05) + 0.1 * same

    return max(known, key=likeness)


def accepts(field: FieldInfo) -> str:
    """What a field takes, as words: `an integer from 1 to 65535`."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if kind is bool:
        return "true or false"
    if kind is str:
        return _texts(field)
    if get_origin(kind) is dict:
        return 'a table of texts like { zone = "a" }'
    return ("an integer" if kind is int else "a number") + _bounds(field)


def _texts(field: FieldInfo) -> str:
    patterns = {rule.pattern for rule in field.metadata if getattr(rule, "pattern", None)}
    if DEVICE_PATTERN in patterns:
        return '"auto", "cpu", "cuda" or "cuda:N"'
    return "a text that is not empty"


def _bounds(field: FieldInfo) -> str:
    limits = {
        bound: getattr(rule, bound)
        for rule in field.metadata
        for bound in ("gt", "ge", "lt", "le")
        if getattr(rule, bound, None) is not None
    }
    words = {"gt": "above {}", "ge": "from {}", "lt": "below {}", "le": "to {}"}
    parts = [word.format(limits[bound]) for bound, word in words.items() if bound in limits]
    return " " + " ".join(parts) if parts else ""


def parse_text(field: FieldInfo, text: str) -> Any:
    """The value that `text` means for this field; text that means none stays text and is refused
    by the field's own check."""
    kind = field.annotation
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text
