"""Writes what of the chart follows from other files; `--check` only says what is out of date.

    python -m helm.generate

values.schema.json comes from values.py, the table in README.md from it and values.yaml, the
dashboard from docs/grafana.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from helm.schema import ROOT, Schema
from helm.values import schema

CHART = ROOT / "helm" / "sanderling"
BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"
LONG = 60


def files() -> dict[Path, str]:
    """Each generated file with the text that it should have."""
    made, values = schema(), yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    require(made, values)
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return {
        CHART / "values.schema.json": json.dumps(made, indent=1) + "\n",
        CHART / "README.md": f"{before}{BEGIN}\n{table(made, values)}{END}{after}",
        CHART / "files" / "dashboard.json": (ROOT / "docs/grafana/sanderling.json").read_text(),
    }


def require(made: Schema, values: Mapping[str, Any]) -> None:
    """What has a default is required, so that nobody takes it away with a null."""
    made["required"] = sorted(values)
    for name, default in values.items():
        inner = made["properties"][name]
        if isinstance(default, dict) and "properties" in inner:
            require(inner, default)


def table(made: Schema, values: Mapping[str, Any]) -> str:
    """The values as a table: name, default, meaning."""
    lines = ["| value | default | what |", "|---|---|---|"]
    for name, default, said in rows(made, values, ""):
        lines.append(f"| `{name}` | {_shown(default)} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def rows(made: Schema, values: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Each value with its default and its sentence; the settings, which have a file of their own
    to describe them, are one row."""
    for name, inner in made.get("properties", {}).items():
        path = f"{prefix}{name}"
        default = values.get(name) if isinstance(values, dict) else None
        if "properties" in inner and path != "settings":
            yield from rows(inner, default or {}, f"{path}.")
        else:
            yield path, default, inner["description"]
        for each in inner.get("patternProperties", {}).values():
            yield from rows(each, {}, f"{path}.NAME.")


def _shown(default: Any) -> str:
    if default is None:
        return ""
    text = json.dumps(default)
    return f"`{text}`" if len(text) <= LONG else "see values.yaml"


def main(arguments: list[str]) -> int:
    stale = [path for path, text in files().items() if not _same(path, text)]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is out of date")
        if "--check" not in arguments:
            path.write_text(files()[path], encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
