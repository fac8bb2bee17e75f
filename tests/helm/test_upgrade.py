"""Install, upgrade, rollback, test and uninstall against an API server's double, and who writes the
number of replicas: an upgrade after autoscaling neither fails nor loses any, in both majors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.chart import CHART, EXAMPLES, MAJORS, Helm, documents
from tests.helm.live import SPACE, Live, release
from tests.helm.tools import Tools
from tests.kubernetes_double import crds
from tests.kubernetes_double.server import Double
from tests.live.service import wait_for

pytestmark = pytest.mark.timeout(900)
CONTROLLER = "sanderling-autoscale"


@pytest.fixture(params=MAJORS)
def live(request: pytest.FixtureRequest, tools: Tools, tmp_path: Path) -> Iterator[Live]:
    with release(tools, request.param, tmp_path) as found:
        yield found


@pytest.mark.parametrize("major", MAJORS)
def test_a_whole_life(tools: Tools, major: int, tmp_path: Path):
    """Each command of Helm, and what is left behind: nothing."""
    with release(tools, major, tmp_path, waits=True) as live:
        _live(live)


def _live(live: Live) -> None:
    notes = live.do("install", "--wait", "--timeout=240s")
    assert "0.55 USD/h" in notes and "helm -n models test x" in notes
    assert {"x-sanderling", "x-sanderling-controller"} <= {
        body["metadata"]["name"] for body in live.all("", "services")
    }
    assert live.numbers() == {"front": 2, "a10g-od": 1, "a10g-spot": 0}
    assert "Succeeded" in live.do("test", "--timeout=240s")
    live.do("upgrade", "--set=controller.replicas=3", "--wait", "--timeout=240s")
    (deployment,) = live.all("apps", "deployments")
    assert deployment["spec"]["replicas"] == 3
    live.do("rollback", "1")
    (deployment,) = live.all("apps", "deployments")
    assert deployment["spec"]["replicas"] == 2
    assert "deployed" in live.do("status")
    live.do("uninstall", "--wait", "--timeout=240s")
    kinds = (
        ("", "configmaps"),
        ("", "services"),
        ("apps", "deployments"),
        ("ray.io", "rayservices"),
    )
    assert [live.all(*kind) for kind in kinds] == [[], [], [], []]
    # Derived, so gone with its service.
    wait_for(lambda: not live.all("ray.io", "rayclusters"), "end of the derived cluster", 20)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("example", [path.stem for path in EXAMPLES])
def test_kuberays_own_definitions_take_it(tools: Tools, tmp_path: Path, major: int, example: str):
    """As an API server takes it: defaults applied, unknown fields dropped, values checked."""
    definitions = crds.kuberay()
    if definitions is None:
        pytest.skip("KubeRay's definitions are not beside the repository (shared/data/kuberay)")
    with release(tools, major, tmp_path, definitions) as live:
        path = CHART / "examples" / f"{example}.yaml"
        chart = ("x", str(CHART), f"--values={path}", "--namespace", SPACE)
        for command in ("install", "upgrade"):
            live.helm.run(command, *chart)
        (service,) = live.all("ray.io", "rayservices")
        (sent,) = [
            d for d in documents(live.helm.run("template", *chart)) if d["kind"] == "RayService"
        ]
        assert contains(service["spec"], sent["spec"])


def contains(stored: object, sent: object) -> bool:
    """All that was sent is there still; defaults may have come."""
    if isinstance(sent, dict) and isinstance(stored, dict):
        return all(name in stored and contains(stored[name], sent[name]) for name in sent)
    if isinstance(sent, list) and isinstance(stored, list):
        return len(sent) == len(stored) and all(map(contains, stored, sent))
    return stored == sent


def test_an_upgrade_after_autoscaling_keeps_replicas(live: Live):
    live.do("install")
    name = live.derived()["metadata"]["name"]
    live.scale("a10g-spot", 5, CONTROLLER)
    live.scale("a10g-od", 2, CONTROLLER)
    scaled = {"front": 2, "a10g-od": 2, "a10g-spot": 5}
    for flags in (
        (),  # the same values again
        ("--set=controller.replicas=3",),  # of another object
        ("--set=workers.a10g.spot.max=6",),  # of the same group, but nothing that pods are made of
        ("--set=workers.a10g.onDemand.min=2",),
    ):
        live.do("upgrade", *flags)
        assert (live.derived()["metadata"]["name"], live.numbers()) == (name, scaled), flags
    live.do("rollback", "1")
    assert (live.derived()["metadata"]["name"], live.numbers()) == (name, scaled)
    assert not [m for m in live.managers("ray.io", "rayclusters", name) if m.lower() == "helm"]
    assert CONTROLLER not in live.managers("ray.io", "rayservices", "x-sanderling-serve")


def test_a_change_of_pods_comes_by_a_second_cluster(live: Live):
    live.do("install")
    before = live.derived()["metadata"]["name"]
    live.do("upgrade", "--set=settings.engine.max_running=32")
    assert live.derived()["metadata"]["name"] != before


def test_had_helm_owned_the_cluster_it_would_have_bitten(live: Live, tmp_path: Path):
    """The same life with a RayCluster in the release, as other charts have it: Helm 4 fails, Helm 3
    resets. So the double does show the conflict that the chart avoids."""
    chart = tmp_path / "other"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: other\nversion: 0.1.0\n")
    (chart / "templates" / "cluster.yaml").write_text(
        "apiVersion: ray.io/v1\nkind: RayCluster\nmetadata: {name: other}\nspec:\n"
        "  headGroupSpec: &pod\n    rayStartParams: {}\n"
        "    template: {spec: {containers: [{name: ray, image: '{{ .Values.image }}'}]}}\n"
        "  workerGroupSpecs:\n    - <<: *pod\n      groupName: w\n      replicas: 1\n"
        "      minReplicas: 0\n      maxReplicas: 9\n"
    )
    common = ("o", str(chart), "--namespace", SPACE)
    live.helm.run("install", *common, "--set=image=a")
    live.scale("w", 4, "ray-autoscaler")
    answer = live.helm.try_("upgrade", *common, "--set=image=b")
    if live.helm.major == 4:
        assert answer.returncode != 0 and "conflict" in answer.stderr
    else:
        assert answer.returncode == 0 and live.numbers() == {"w": 1}


@pytest.mark.parametrize("major", MAJORS)
def test_without_kuberay_it_says_what_is_missing(tools: Tools, major: int, tmp_path: Path):
    with Double() as double:
        account = {"name": "default", "namespace": "default"}
        double.add({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        helm = Helm(tools, major, tmp_path, double.kubeconfig(tmp_path / "config"))
        answer = helm.try_("install", "x", str(CHART))
        assert answer.returncode != 0 and "install KubeRay first" in answer.stderr
