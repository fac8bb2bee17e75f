"""What the tests of the chart share: the tools, both Helms, and each example rendered once."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helm.chart import EXAMPLES, MAJORS, Body, Helm, documents
from tests.helm.tools import Tools
from tests.helm.tools import tools as find_tools


@pytest.fixture(scope="session")
def tools() -> Tools:
    return find_tools()


@pytest.fixture(scope="session")
def helms(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Helm]:
    folder = tmp_path_factory.mktemp("helm")
    return {major: Helm(tools, major, folder) for major in MAJORS}


@pytest.fixture(scope="session")
def rendered(helms: Mapping[int, Helm]) -> Mapping[str, list[Body]]:
    """Objects of the defaults ("defaults") and of each example, by Helm 4."""
    files: dict[str, tuple[Path, ...]] = {"defaults": (), **{p.stem: (p,) for p in EXAMPLES}}
    return {
        name: documents(helms[4].template(*(f"--values={path}" for path in paths)))
        for name, paths in files.items()
    }
