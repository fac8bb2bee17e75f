"""TOML files into frozen models. What is not accepted is refused in a sentence that names the file,
the place in it, and what would be accepted: for an unknown key the nearest known one."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cluster.settings.catalog import nearest


class Strict(BaseModel):
    """A table of a file: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Table = TypeVar("Table", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content. ValueError when it cannot be read as TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def validated(model: type[Table], content: Any, where: str) -> Table:
    """`content` as a `model`; ValueError with a sentence for each mistake, led by `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        sentences = [_sentence(model, detail) for detail in error.errors()]
        raise ValueError("\n".join(f"{where}: {sentence}" for sentence in sentences)) from None


def _sentence(model: type[BaseModel], detail: ErrorDetails) -> str:
    place = _place(detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"])
        return f"{place} is no known key; the nearest is {nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{place} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place} = {detail['input']!r} is not accepted: {message[:1].lower()}{message[1:]}"


def _place(loc: tuple[int | str, ...]) -> str:
    """`("offer", 1, "count")` -> `offer 2, count`."""
    words = ""
    for part in loc:
        words += f" {part + 1}" if isinstance(part, int) else f"{', ' if words else ''}{part}"
    return words or "the file"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The known keys of the table in which the last part of `loc` stands."""
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _table_in(model.model_fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_table_in(inner) for inner in getattr(annotation, "__args__", ())]
    return next((each for each in found if each), None)
