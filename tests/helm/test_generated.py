"""What is generated is up to date, every value is described, alerts name metrics that there are."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscale.catalog.kinds import read_kinds
from cluster.settings.catalog import KNOWN
from helm import generate
from helm.schema import DERIVED, kinds
from helm.values import schema
from serve import observe
from tests.helm.chart import CHART, Body, of


def test_nothing_is_out_of_date():
    stale = [str(path) for path, text in generate.files().items() if path.read_text() != text]
    assert stale == [], "python -m helm.generate"


def test_a_stale_file_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copy = tmp_path / "helm" / "sanderling"
    shutil.copytree(CHART, copy)
    monkeypatch.setattr(generate, "CHART", copy)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    (tmp_path / "docs" / "grafana").mkdir(parents=True)
    dashboard = (CHART / "files" / "dashboard.json").read_text()
    (tmp_path / "docs" / "grafana" / "sanderling.json").write_text(dashboard)
    assert generate.main(["--check"]) == 0
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("| `front.replicas` | `2` |", "| `front` | `2` |"))
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0


def tables(node: Any, path: str = "") -> Iterator[tuple[str, Body]]:
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from tables(inner, f"{path}.{name}")
    for inner in node.get("patternProperties", {}).values():
        yield from tables(inner, f"{path}.*")


def test_every_value_is_described_and_strict():
    made = schema()
    for path, node in tables(made):
        assert node.get("description"), path
        if "properties" in node:
            assert node["additionalProperties"] is (path == ".global"), path


def test_defaults_are_all_in_the_schema():
    """And the reverse, but for what has no default."""

    def names(values: Any, prefix: str = "") -> set[str]:
        found = set()
        for name, value in values.items():
            found.add(f"{prefix}.{name}")
            found |= names(value, f"{prefix}.{name}") if isinstance(value, dict) else set()
        return found

    described = {path for path, _ in tables(schema())}
    foreign = ("SecurityContext.", "securityContext.", "Labels.", ".labels.", "requests", "limits")
    given = {
        n
        for n in names(yaml.safe_load((CHART / "values.yaml").read_text()))
        if not any(part in n for part in foreign)
    }
    assert given <= described


def test_settings_of_the_schema_are_the_programs():
    found = {
        path.removeprefix(".settings.")
        for path, node in tables(schema())
        if path.startswith(".settings.") and "properties" not in node
    }
    assert found == set(KNOWN) - DERIVED
    assert set(KNOWN) >= DERIVED


def test_gpu_kinds_are_the_catalogues():
    assert set(kinds()) == set(read_kinds())


METRIC = re.compile(r"\b(?:vllm:[a-z0-9_]+|sanderling_[a-z0-9_]+)")


def test_alerts_name_real_metrics(rendered: Mapping[str, list[Body]]):
    rule = of(rendered["a10g-spot"], "PrometheusRule")
    alerts = rule["spec"]["groups"][0]["rules"]
    assert len(alerts) >= 4
    source = Path(observe.__file__).read_text()
    for alert in alerts:
        assert alert["annotations"]["summary"] and alert["labels"]["severity"]
        for name in METRIC.findall(alert["expr"]):
            stem = name.removesuffix("_total").removesuffix("_bucket")
            short = stem.removeprefix("vllm:").removeprefix("sanderling_")
            assert stem in source or f'"{short}"' in source, name


def test_the_dashboard_is_whole(rendered: Mapping[str, list[Body]]):
    made = of(rendered["a10g-spot"], "ConfigMap", "x-sanderling-dashboard")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(made["data"]["sanderling.json"])
    assert board["title"] == "Sanderling" and len(board["panels"]) >= 10
