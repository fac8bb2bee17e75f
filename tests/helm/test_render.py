"""Both Helm majors lint and render every file of values for the oldest and the newest Kubernetes,
and every document is valid there."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.helm import crd
from tests.helm.chart import (
    CHART,
    EXAMPLES,
    FILES,
    MAJORS,
    UNSCHEMED,
    VERSIONS,
    Body,
    Helm,
    documents,
    pods,
    training_job,
)


def test_the_examples_are_the_promised_ones():
    assert [path.stem for path in EXAMPLES] == [
        "a10g-spot",
        "cpu-dev",
        "h100-on-demand-and-spot",
        "mi300-mixed",
    ]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("version", VERSIONS)
def test_both_majors_lint_and_render_the_same(helms: Mapping[int, Helm], name: str, version: str):
    made = {}
    for major in MAJORS:
        lint = ("lint", "--strict", f"--kube-version={version}", str(CHART), *FILES[name])
        assert "0 chart(s) failed" in helms[major].run(*lint)
        made[major] = documents(helms[major].template(f"--kube-version={version}", *FILES[name]))
    assert made[3] == made[4]
    assert {"RayService", "ConfigMap", "Service"} <= {body["kind"] for body in made[4]}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(rendered: Mapping[str, list[Body]], name: str, version: str):
    """Kubernetes' own by its published schemas, with unknown fields refused."""
    checked = set()
    for body in rendered[name]:
        if body["apiVersion"].startswith("ray.io/") or body["kind"] in UNSCHEMED:
            assert set(body) == {"apiVersion", "kind", "metadata", "spec"}
            continue
        short = version.rpartition(".")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(body, short, strict=True)
        checked.add(body["kind"])
    assert {"ConfigMap", "Service", "Pod", "NetworkPolicy", "ServiceAccount"} <= checked


@pytest.mark.parametrize("name", FILES)
def test_pod_templates_of_ray_are_valid_pods(rendered: Mapping[str, list[Body]], name: str):
    """Each converted to a Pod, for Kubernetes' schema; KubeRay's own is the next test."""
    for where, template in pods(rendered[name]):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"] = {"name": "a", **pod["metadata"]}
        try:
            kubernetes_validate.validate(pod, "1.29", strict=True)
        except kubernetes_validate.ValidationError as error:
            raise AssertionError(f"{where}: {error}") from error


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_ray_objects_fit_kuberay(rendered: Mapping[str, list[Body]], name: str):
    bodies = [b for b in rendered[name] if b["apiVersion"] == crd.RAY] + training_job(
        rendered[name]
    )
    assert bodies
    assert [problem for body in bodies for problem in crd.problems(body)] == []


@pytest.mark.data
def test_the_check_of_ray_objects_sees(rendered: Mapping[str, list[Body]]):
    good = next(b for b in rendered["a10g-spot"] if b["kind"] == "RayService")

    def broken(**of_group: object) -> list[str]:
        body = copy.deepcopy(good)
        body["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(of_group)
        return crd.problems(body)

    assert broken() == []
    for wrong in (
        {"replicas": "2"},
        {"replica": 2},
        {"priority": 5},
        {"idleTimeoutSeconds": 5},
        {"minReplicas": 9},
        {"rayStartParams": {"labels": "a=b"}},
    ):
        assert broken(**wrong), wrong


def test_the_strict_check_sees(rendered: Mapping[str, list[Body]]):
    body = copy.deepcopy(next(b for b in rendered["defaults"] if b["kind"] == "Service"))
    body["spec"]["port"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(body, "1.37", strict=True)


def test_the_chart_is_packaged_the_same_twice(helms: Mapping[int, Helm], tmp_path: Path):
    """As an archive it renders as the folder does, and holds no examples."""
    helms[4].run("package", str(CHART), "--destination", str(tmp_path))
    (archive,) = tmp_path.glob("*.tgz")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    assert archive.name == f"sanderling-{version}.tgz"
    command = ("template", "x", str(archive), "--namespace", "models")
    assert helms[3].run(*command) == helms[3].template()


def test_an_older_kubernetes_is_refused(helms: Mapping[int, Helm]):
    for helm in helms.values():
        assert "1.29.0" in helm.refuse("--kube-version=1.28.0")
