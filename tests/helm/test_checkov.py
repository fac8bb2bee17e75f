"""checkov has nothing against the chart but what is explained, and would see it if it had."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helm import checks
from tests.helm.chart import EXAMPLES, Body

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_exceptions_are_few():
    assert len(checks.ALLOWED) <= 5 and all(len(why) > 40 for why in checks.ALLOWED.values())


@pytest.mark.parametrize("name", ["defaults", *(path.stem for path in EXAMPLES)])
def test_nothing_is_left(rendered: Mapping[str, list[Body]], name: str, tmp_path: Path):
    verdict = checks.judge(rendered[name], tmp_path)
    assert verdict.passed > 300 and verdict.unexplained == ()


def test_probes_are_missing_only_in_the_tests_pod(
    rendered: Mapping[str, list[Body]], tmp_path: Path
):
    failed = checks.judge(rendered["cpu-dev"], tmp_path).failed
    probes = [each for each in failed if each.split()[0] in ("CKV_K8S_8", "CKV_K8S_9")]
    assert probes and all("test-completion" in each for each in probes)


def test_a_weakness_of_a_ray_pod_is_seen(rendered: Mapping[str, list[Body]], tmp_path: Path):
    objects = copy.deepcopy(rendered["cpu-dev"])
    service = next(b for b in objects if b["kind"] == "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["securityContext"]["privileged"] = True
    assert any(c.startswith("CKV_K8S_16 ") for c in checks.judge(objects, tmp_path).unexplained)
