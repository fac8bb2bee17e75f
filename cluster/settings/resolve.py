"""Merges defaults < TOML file < environment < flags into one frozen Settings, with origins.

Called once by the CLI (through cluster/options.py); everything behind it is handed the result.
Unknown names and values that are not accepted raise SettingsError, a sentence for their author.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.settings.catalog import (
    ENVIRONMENT_PREFIX,
    KNOWN,
    accepts,
    environment_name,
    nearest,
    parse_text,
)
from cluster.settings.dump import to_toml
from cluster.settings.errors import SettingsError
from cluster.settings.sections import Settings


class Assignment(NamedTuple):
    """One value given by a person, and where."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """The settings in force and, for each that was given, its origin in words."""

    settings: Settings
    origins: Mapping[str, str]

    def to_toml(self) -> str:
        """A complete file that resolves to the same settings; given values name their origin."""
        return to_toml(self.settings, self.origins)


def resolve(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, str | None] | None = None,
) -> Resolved:
    """Resolve settings; later sources win: defaults, `file`, `environ`, then `sets` and `flags`.

    environ: usually os.environ; only SANDERLING_* is read (SANDERLING_HTTP__PORT = http.port).
    sets: texts "http.port=8001" of --set.
    flags: named flags by dotted name, {"http.port": "8001"}; None means the flag was not given.
    """
    given = [
        *(_from_file(file) if file else ()),
        *_from_environment(environ or {}),
        *(_from_set(text) for text in sets),
        *_from_flags(flags or {}),
    ]
    origins = {assignment.name: assignment.origin for assignment in given}
    try:
        settings = Settings.model_validate(_nested(given))
    except ValidationError as error:
        sentences = [_sentence(detail, origins) for detail in error.errors()]
        raise SettingsError("\n".join(sentences)) from None
    return Resolved(settings, MappingProxyType(origins))


def _from_file(file: Path) -> Iterator[Assignment]:
    origin = f"file {file}"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings {origin}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the settings {origin} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings {origin} is not valid TOML: {error}") from None
    yield from _flatten(content, "", origin)


def _flatten(table: Mapping[str, Any], prefix: str, origin: str) -> Iterator[Assignment]:
    for key, value in table.items():
        name = prefix + key
        if name in KNOWN:
            yield Assignment(name, value, origin)
        elif not any(known.startswith(f"{name}.") for known in KNOWN):
            raise _unknown(name, origin)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}.", origin)
        else:
            raise SettingsError(
                f"{name} = {value!r} ({origin}) is not accepted: {name} is a table, [{name}]"
            )


def _from_environment(environ: Mapping[str, str]) -> Iterator[Assignment]:
    variables = {environment_name(name): name for name in KNOWN}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in variables:
            raise SettingsError(
                f"the environment variable {variable} is no known setting; "
                f"the nearest is {nearest(variable, variables)}"
            )
        name = variables[variable]
        value = parse_text(KNOWN[name], environ[variable])
        yield Assignment(name, value, f"environment variable {variable}")


def _from_set(text: str) -> Assignment:
    name, equals, value = text.partition("=")
    name = name.strip()
    origin = f"flag --set {text}"
    if not equals:
        raise SettingsError(f"--set {text} is not accepted: it takes name=value, as http.port=8001")
    if name not in KNOWN:
        raise _unknown(name, origin)
    return Assignment(name, parse_text(KNOWN[name], value.strip()), origin)


def _from_flags(flags: Mapping[str, str | None]) -> Iterator[Assignment]:
    for name, text in flags.items():
        assert name in KNOWN, f"a command declares a flag for {name}, which is no setting"
        if text is not None:
            origin = f"flag --{name.rpartition('.')[2].replace('_', '-')}"
            yield Assignment(name, parse_text(KNOWN[name], text), origin)


def _unknown(name: str, origin: str) -> SettingsError:
    return SettingsError(f"{name} ({origin}) is no known setting; the nearest is {nearest(name)}")


def _nested(given: Iterable[Assignment]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for assignment in given:
        *sections, key = assignment.name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = assignment.value
    return tree


def _sentence(detail: ErrorDetails, origins: Mapping[str, str]) -> str:
    """One error of pydantic, said in the words of the settings."""
    path = ".".join(str(part) for part in detail["loc"])
    name = next((known for known in KNOWN if f"{path}.".startswith(f"{known}.")), None)
    if name is None:  # a rule between several values of one section
        involved = [f"{known} from {origins[known]}" for known in origins if known.startswith(path)]
        rule = str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]
        return f"{rule} ({', '.join(involved)})"
    origin = origins.get(name, "default")
    return (
        f"{name} = {detail['input']!r} ({origin}) is not accepted; it takes {accepts(KNOWN[name])}"
    )
