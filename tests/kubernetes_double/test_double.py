"""The API server's double answers the official client as a real server does."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes_double import crds
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.rbac import account
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import group, install, ray_service
from tests.kubernetes_double.store import At

k8s = pytest.importorskip("kubernetes")
POD = {"metadata": {"name": "p", "labels": {"a": "b"}}, "spec": {"containers": []}}


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as made:
        yield made


def client(double: Double, folder: Path, user: str = "admin") -> Any:
    config = double.kubeconfig(folder / f"config-{len(user)}", user)
    return k8s.config.new_client_from_config(str(config))


def refused(code: int) -> Any:
    return pytest.raises(k8s.client.ApiException, match=f"\\({code}\\)")


def test_objects_have_versions_and_a_stale_write_is_refused(double: Double, tmp_path: Path):
    core = k8s.client.CoreV1Api(client(double, tmp_path))
    first = core.create_namespaced_pod("default", POD)
    assert first.metadata.uid and first.metadata.generation == 1
    with refused(409):
        core.create_namespaced_pod("default", POD)
    first.metadata.labels = {"a": "c"}
    second = core.replace_namespaced_pod("p", "default", first)
    assert int(second.metadata.resource_version) > int(first.metadata.resource_version)
    with refused(409):
        core.replace_namespaced_pod("p", "default", first)
    for selector, many in {"a=c": 1, "a in (b,d)": 0, "!a": 0, "a": 1, "a!=c": 0}.items():
        assert len(core.list_namespaced_pod("default", label_selector=selector).items) == many
    fields = "metadata.name=p,status.phase=Pending"
    assert len(core.list_pod_for_all_namespaces(field_selector=fields).items) == 1
    core.delete_namespaced_pod("p", "default")
    with refused(404):
        core.read_namespaced_pod("p", "default")


def test_status_and_the_rest_are_apart(double: Double, tmp_path: Path):
    core = k8s.client.CoreV1Api(client(double, tmp_path))
    core.create_namespaced_pod("default", POD)
    body = {"metadata": {"labels": {"x": "y"}}, "status": {"phase": "Running"}}
    assert core.patch_namespaced_pod("p", "default", body).status.phase == "Pending"
    changed = core.patch_namespaced_pod_status("p", "default", {"status": {"phase": "Running"}})
    assert changed.status.phase == "Running" and changed.metadata.labels == {"a": "b", "x": "y"}


def test_a_strategic_patch_replaces_taints_and_merges_conditions(double: Double, tmp_path: Path):
    core = k8s.client.CoreV1Api(client(double, tmp_path))
    core.create_node({"metadata": {"name": "n"}})
    for key in "ab":
        core.patch_node("n", {"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}})
        condition = {"type": key, "status": "True"}
        core.patch_node_status("n", {"status": {"conditions": [condition]}})
    node = core.read_node("n")
    assert [taint.key for taint in node.spec.taints] == ["b"]
    assert {condition.type for condition in node.status.conditions} == {"a", "b"}


@pytest.mark.parametrize("which", ["small", "kuberay"])
def test_custom_resources_are_defaulted_pruned_and_validated(
    which: str, double: Double, tmp_path: Path
):
    definitions = crds.small() if which == "small" else crds.kuberay()
    if definitions is None:
        pytest.skip(f"KubeRay's definitions are not at {crds.DATA}")
    for definition in definitions:
        double.add(definition)
    custom = k8s.client.CustomObjectsApi(client(double, tmp_path))
    place: Any = ("ray.io", "v1", "default", "rayservices")
    service = ray_service(group("g", "spot", 4, 1.0))
    made = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    del made["replicas"]
    made["nonsense"] = 1
    kept = custom.create_namespaced_custom_object(*place, service)
    found = kept["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert found["replicas"] == 0 and "nonsense" not in found
    made["maxReplicas"] = "four"
    service["metadata"]["name"] = "other"
    with refused(422):
        custom.create_namespaced_custom_object(*place, service)


def test_apply_refuses_what_another_manager_owns(double: Double, tmp_path: Path):
    """The find that the chart is built around: an atomic list has one owner."""
    install(double, group("g", "spot", 4, 1.0))
    cluster = Cluster(double.store)
    cluster.tick()
    custom = k8s.client.CustomObjectsApi(client(double, tmp_path))
    name = custom.list_namespaced_custom_object("ray.io", "v1", "default", "rayclusters")
    where: Any = ("ray.io", "v1", "default", "rayclusters", name["items"][0]["metadata"]["name"])

    def apply(replicas: int, manager: str, *, force: bool = False) -> Any:
        service = ray_service(group("g", "spot", 4, 1.0, replicas=replicas))
        body = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": where[-1]},
            "spec": service["spec"]["rayClusterConfig"],
        }
        return custom.patch_namespaced_custom_object(
            *where,
            body,
            field_manager=manager,
            force=force,
            _content_type="application/apply-patch+yaml",
        )

    with refused(409):
        apply(3, "helm")
    assert apply(3, "helm", force=True)["spec"]["workerGroupSpecs"][0]["replicas"] == 3
    assert apply(2, "helm")["spec"]["workerGroupSpecs"][0]["replicas"] == 2
    with refused(409):
        apply(4, "sanderling-autoscale")


def test_watches_tell_what_happened_since_and_410_what_is_forgotten(double: Double, tmp_path: Path):
    core = k8s.client.CoreV1Api(client(double, tmp_path))
    since = core.list_namespaced_pod("default").metadata.resource_version
    core.create_namespaced_pod("default", POD)
    core.patch_namespaced_pod("p", "default", {"metadata": {"labels": {"a": "z"}}})
    core.delete_namespaced_pod("p", "default")
    watch = k8s.watch.Watch()
    seen = watch.stream(
        core.list_namespaced_pod, "default", resource_version=since, timeout_seconds=1
    )
    assert [event["type"] for event in seen] == ["ADDED", "MODIFIED", "DELETED"]
    seen = watch.stream(
        core.list_namespaced_pod,
        "default",
        label_selector="a=b",
        resource_version=since,
        timeout_seconds=1,
    )
    assert [event["type"] for event in seen] == ["ADDED", "DELETED"], "it fits no more"
    double.store.compact()
    with refused(410):
        list(
            watch.stream(
                core.list_namespaced_pod, "default", resource_version=since, timeout_seconds=1
            )
        )


def test_evictions_respect_budgets(double: Double, tmp_path: Path):
    core = k8s.client.CoreV1Api(client(double, tmp_path))
    policy = k8s.client.PolicyV1Api(core.api_client)
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "phase": "Running"}
    for name in "pq":
        core.create_namespaced_pod(
            "default", {**POD, "metadata": {"name": name, "labels": {"a": "b"}}}
        )
        core.patch_namespaced_pod_status(name, "default", {"status": ready})
    budget = {
        "metadata": {"name": "b"},
        "spec": {"maxUnavailable": "50%", "selector": {"matchLabels": {"a": "b"}}},
    }
    policy.create_namespaced_pod_disruption_budget("default", budget)
    body = {"metadata": {"name": "p"}}
    core.create_namespaced_pod_eviction("p", "default", body)
    core.create_namespaced_pod("default", {**POD, "metadata": {"name": "p", "labels": {"a": "b"}}})
    core.patch_namespaced_pod_status("p", "default", {"status": {"phase": "Running"}})
    with refused(429):
        core.create_namespaced_pod_eviction("q", "default", {"metadata": {"name": "q"}})
    core.create_namespaced_pod_eviction("p", "default", body)  # it is not healthy: nobody needs it


def test_rights_are_evaluated(tmp_path: Path):
    with Double(enforce=True) as double:
        user = account("default", "reader")
        rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]
        group_name = "rbac.authorization.k8s.io"
        made: dict[str, dict[str, Any]] = {
            "Role": {"rules": rules},
            "RoleBinding": {
                "roleRef": {"kind": "Role", "name": "r", "apiGroup": group_name},
                "subjects": [{"kind": "ServiceAccount", "name": "reader"}],
            },
        }
        for kind, more in made.items():
            about = {"apiVersion": f"{group_name}/v1", "kind": kind}
            double.add({**about, "metadata": {"name": "r", "namespace": "default"}, **more})
        core = k8s.client.CoreV1Api(client(double, tmp_path, user))
        assert core.list_namespaced_pod("default").items == []
        for forbidden in (core.list_node, core.list_pod_for_all_namespaces):
            with refused(403):
                forbidden()
        with refused(403):
            core.create_namespaced_pod("default", POD)
        assert [code for _, code in double.attempts] == [200, 403, 403, 403]


def test_a_service_becomes_pods_and_a_changed_one_a_new_cluster(double: Double):
    install(double, group("g", "spot", 4, 1.0, replicas=2))
    cluster = Cluster(double.store, Cloud(startup_s=0.0))
    cluster.tick()
    assert len(cluster.workers("g")) == 2
    [old] = double.store.list(At("ray.io", "v1", "rayclusters"))[0]

    def with_image(body: Any) -> Any:
        specs = body["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        specs[0]["template"]["spec"]["containers"][0]["image"] = "new"
        return body

    double.store.update(
        At("ray.io", "v1", "rayservices", "default", "sanderling-serve"), with_image
    )
    cluster.tick()
    [new] = double.store.list(At("ray.io", "v1", "rayclusters"))[0]
    assert new["metadata"]["name"] != old["metadata"]["name"]
    assert {p["spec"]["containers"][0]["image"] for p in cluster.workers("g")} == {"new"}


def test_what_was_made_for_an_owner_that_went_meanwhile_is_collected(double: Double):
    """With all that it owns itself; what has an owner stays."""
    install(double, group("g", "spot", 4, 1.0, replicas=2))
    cluster = Cluster(double.store, Cloud(startup_s=0.0))
    cluster.tick()
    place = At("ray.io", "v1", "rayclusters", "default")
    [kept] = double.store.list(place)[0]
    pods = At("", "v1", "pods", "default")
    running = double.store.list(pods)[0]
    late = {"metadata": {**kept["metadata"], "name": "late", "uid": ""}, "spec": kept["spec"]}
    late["metadata"]["ownerReferences"] = [
        {**kept["metadata"]["ownerReferences"][0], "uid": "of one that is gone"}
    ]
    double.store.create(place, late)
    cluster.tick()
    assert [body["metadata"]["name"] for body in double.store.list(place)[0]] == [
        kept["metadata"]["name"]
    ]
    names = {body["metadata"]["name"] for body in double.store.list(pods)[0]}
    assert names == {body["metadata"]["name"] for body in running}


def test_an_appended_group_is_written_over_what_others_wrote(double: Double):
    """As KubeRay's modifyRayCluster does: live numbers and annotations go."""
    groups = [group("g", "spot", 4, 1.0)]
    install(double, *groups)
    cluster = Cluster(double.store, Cloud(startup_s=0.0))
    cluster.tick()
    [body] = double.store.list(At("ray.io", "v1", "rayclusters"))[0]
    body["spec"]["workerGroupSpecs"][0]["replicas"] = 3
    body["metadata"]["annotations"]["mine"] = "kept?"
    double.store.update(double.at(body), lambda _: body)
    cluster.tick()
    assert len(cluster.workers("g")) == 3
    service = ray_service(*groups)
    config = service["spec"]["rayClusterConfig"]
    config["workerGroupSpecs"].append(group("h", "spot", 4, 1.0))
    double.store.update(double.at(service), lambda old: {**old, "spec": service["spec"]})
    cluster.tick()
    [after] = double.store.list(At("ray.io", "v1", "rayclusters"))[0]
    assert after["metadata"]["uid"] == body["metadata"]["uid"]
    assert after["spec"]["workerGroupSpecs"][0]["replicas"] == 0 == len(cluster.workers("g"))
    assert "mine" not in after["metadata"]["annotations"]


def test_the_definitions_beside_the_repository_are_read_whole():
    found = crds.kuberay()
    if found is None:
        pytest.skip(f"KubeRay's definitions are not at {crds.DATA}")
    kinds = {each["spec"]["names"]["kind"] for each in found}
    assert {"RayCluster", "RayService", "RayJob"} <= kinds
    for file in crds.DATA.glob("*.gz"):
        assert json.loads(gzip.decompress(file.read_bytes()))["kind"].startswith("Custom")
