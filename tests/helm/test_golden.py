"""What has to be true of every pod, role, secret and budget of the chart, whatever the values."""

import json
import re
from collections.abc import Mapping
from itertools import chain

import pytest

from autoscale.providers.kubernetes.rights import RIGHTS
from tests.helm.chart import EXAMPLES, Body, containers, groups, of, pods

NAMES = ("defaults", *(path.stem for path in EXAMPLES))
FEWEST_PODS = 4  # head, front, a worker, the test
PLACEHOLDER = ("LEASE", "NAMESPACE", "SERVICE", "TTFT_S")
READ_WRITE = {"/run/sanderling", "/var/lib/sanderling", "/home/sanderling", "/tmp", "/dev/shm"}


def weaknesses(where: str, pod: Body) -> list[str]:
    """What Pod Security's level `restricted` and a read-only root would have against a pod."""
    found, spec = [], pod["spec"]
    shared = spec.get("securityContext", {})
    if shared.get("seccompProfile") != {"type": "RuntimeDefault"} or not shared.get("runAsNonRoot"):
        found.append(f"{where}: pod")
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            found.append(f"{where}: {name}")
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        found.append(f"{where}: hostPath")
    for container in containers(pod):
        context, name = container.get("securityContext", {}), container["name"]
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        found += [f"{where} {name}: {k}" for k, v in wanted.items() if context.get(k) != v]
        if context.get("runAsUser", 0) < 10_000 or context.get("privileged"):
            found.append(f"{where} {name}: user")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_container_is_restricted(rendered: Mapping[str, list[Body]], name: str):
    every = list(pods(rendered[name]))
    assert len(every) >= FEWEST_PODS
    assert list(chain.from_iterable(weaknesses(*each) for each in every)) == []


def test_a_weakness_is_seen(rendered: Mapping[str, list[Body]]):
    changes: tuple[Body, ...] = (
        {"readOnlyRootFilesystem": False},
        {"capabilities": {"drop": []}},
        {"privileged": True},
        {"runAsUser": 0},
    )
    for change in changes:
        where, pod = next(pods(json.loads(json.dumps(rendered["defaults"]))))
        containers(pod)[0]["securityContext"].update(change)
        assert weaknesses(where, pod), change


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_can_live_with_a_read_only_root(rendered: Mapping[str, list[Body]], name: str):
    """Ray's pods have a writable folder wherever Ray, torch and Triton write, each an emptyDir."""
    for where, pod in pods(rendered[name]):
        if not where.startswith(("Ray",)):
            continue
        (main,) = pod["spec"]["containers"]
        empty = {v["name"] for v in pod["spec"]["volumes"] if "emptyDir" in v}
        written = {m["mountPath"] for m in main["volumeMounts"] if m["name"] in empty}
        assert written >= READ_WRITE, where
        variables = {e["name"]: e.get("value", "") for e in main["env"]}
        for folder in ("HOME", "TMPDIR", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
            assert any(variables[folder].startswith(path) for path in READ_WRITE), (where, folder)
        memory = next(v for v in pod["spec"]["volumes"] if v["name"] == "shared-mem")["emptyDir"]
        assert memory["medium"] == "Memory" and memory["sizeLimit"]


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_says_what_it_needs_and_how_it_is(rendered: Mapping[str, list[Body]], name: str):
    for where, pod in pods(rendered[name]):
        spec = pod["spec"]
        # Or a Service called sanderling would be read as settings, SANDERLING_SERVICE_HOST.
        assert spec["enableServiceLinks"] is False, where
        token = where.startswith("Deployment") or (
            "head" in where and ("mi300" in name or where.startswith("RayJob"))
        )
        assert spec["automountServiceAccountToken"] is token, where
        for container in containers(pod):
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), where
            assert container["imagePullPolicy"] == "IfNotPresent"
        if where.startswith("Pod"):
            continue
        (main,) = spec["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(main), where
        assert any(key.startswith("checksum/") for key in pod["metadata"]["annotations"]), where


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_is_drained_within_a_notice(rendered: Mapping[str, list[Body]], name: str):
    workers = {n: g for n, g in groups(rendered[name]).items() if n != "front"}
    assert workers
    for group in workers.values():
        spec = group["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "serve.leaving"]
        deadline_s = int(command[command.index("--deadline-s") + 1])
        assert deadline_s + 15 <= spec["terminationGracePeriodSeconds"] <= 120


def spot_of(pod: Body) -> str:
    """in: only on spot nodes; out: only on others."""
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    operators = {e["operator"] for term in terms for e in term["matchExpressions"]}
    keys = [e["key"] for term in terms for e in term["matchExpressions"]]
    assert {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot"} <= set(keys)
    if operators == {"In"}:
        assert len(terms) == len(keys)  # any of them
        return "in"
    assert operators == {"NotIn"} and len(terms) == 1  # none of them
    return "out"


@pytest.mark.parametrize("name", NAMES)
def test_only_spot_workers_are_on_spot(rendered: Mapping[str, list[Body]], name: str):
    for where, pod in pods(rendered[name]):
        if not where.startswith("Pod"):
            assert spot_of(pod) == ("in" if where.endswith("-spot") else "out"), where


def test_the_head_is_protected(rendered: Mapping[str, list[Body]]):
    service = of(rendered["a10g-spot"], "RayService")["spec"]
    assert service["excludeHeadPodFromServeSvc"] is True
    cluster = service["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    notes = head["template"]["metadata"]["annotations"]
    assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert notes["karpenter.sh/do-not-disrupt"] == "true"
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]


def test_gpu_groups_ask_for_their_device(rendered: Mapping[str, list[Body]]):
    devices = {"a10g": "nvidia.com/gpu", "mi300x": "amd.com/gpu"}
    for name, group in groups(rendered["mi300-mixed"]).items():
        kind = name.rpartition("-")[0]
        spec = group["template"]["spec"]
        limits = spec["containers"][0]["resources"]["limits"]
        assert {k for k in limits if "gpu" in k} == ({devices[kind]} if kind in devices else set())
        if kind in devices:
            assert {"key": devices[kind], "operator": "Exists", "effect": "NoSchedule"} in spec[
                "tolerations"
            ]
            assert group["labels"]["sanderling/kind"] == kind


def test_tolerations_add_up(rendered: Mapping[str, list[Body]]):
    """Of the values, of the device and of spot: none replaces another."""
    found = groups(rendered["a10g-spot"])
    keys = {
        n: {t["key"] for t in g["template"]["spec"]["tolerations"]}
        for n, g in found.items()
        if n != "front"
    }
    assert keys["a10g-od"] == {"nvidia.com/gpu"}
    assert keys["a10g-spot"] > {"nvidia.com/gpu", "example.com/spot", "karpenter.sh/capacity-type"}


def test_labels_are_what_the_planner_reads(rendered: Mapping[str, list[Body]]):
    from autoscale.providers.kubernetes.view import groups as offers

    cluster = of(rendered["a10g-spot"], "RayService")["spec"]["rayClusterConfig"]
    read = {g.name: (g.offer, g.role) for g in offers({"spec": cluster})}
    assert set(read) == {"a10g-od", "a10g-spot"}  # the front is not for sale
    spot, role = read["a10g-spot"]
    assert (spot.kind, spot.market, spot.usd_per_h, spot.quota) == ("a10g", "spot", 0.55, 7)
    assert role == "decode"


@pytest.mark.parametrize("name", NAMES)
def test_rights_are_those_that_the_controller_asks_for(
    rendered: Mapping[str, list[Body]], name: str
):
    roles = [b for b in rendered[name] if b["kind"] in ("Role", "ClusterRole")]
    given: set[tuple[str, str, str, bool]] = set()
    for role in roles:
        for rule in role["rules"]:
            assert set(rule) <= {"apiGroups", "resources", "verbs", "resourceNames"}
            assert "*" not in chain(*rule.values()) and "secrets" not in rule["resources"]
            named = rule.get("resourceNames") == ["x-sanderling-controller"]
            assert named or "resourceNames" not in rule
            given |= {
                (group, resource, verb, named)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
            }
            assert (role["kind"] == "ClusterRole") == (rule["resources"] == ["nodes"])
    wanted = {
        (right.group, resource, verb, right.own and verb != "create")
        for resource, right in RIGHTS.items()
        for verb in right.verbs
    }
    has_controller = any(b["kind"] == "Deployment" for b in rendered[name])
    assert given == (wanted if has_controller else set())


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_is_in_sight(rendered: Mapping[str, list[Body]], name: str):
    assert [b for b in rendered[name] if b["kind"] == "Secret"] == []
    for where, pod in pods(rendered[name]):
        for container in containers(pod):
            for variable in container.get("env", []):
                hot = re.search("TOKEN$|PASSWORD|SECRET|_KEY$", variable["name"])
                assert not hot or "valueFrom" in variable, (where, variable)


@pytest.mark.parametrize("name", NAMES)
def test_no_placeholder_is_left(rendered: Mapping[str, list[Body]], name: str):
    text = json.dumps([b for b in rendered[name] if b["kind"] != "Pod"])
    assert [word for word in PLACEHOLDER if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_budgets_let_a_node_be_drained(rendered: Mapping[str, list[Body]], name: str):
    """Of Ray's pods only an integer minAvailable counts (nothing that has a scale owns them), and
    it is below what there always is; with one replica there is no budget."""
    floors = {"front": groups(rendered[name])["front"]["minReplicas"]}
    floors["worker"] = sum(
        g["minReplicas"] for n, g in groups(rendered[name]).items() if n != "front"
    )
    seen = set()
    for budget in (b for b in rendered[name] if b["kind"] == "PodDisruptionBudget"):
        of_what = budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        seen.add(of_what)
        if of_what == "controller":
            assert budget["spec"]["maxUnavailable"] == 1
            continue
        least = budget["spec"]["minAvailable"]
        assert isinstance(least, int) and 1 <= least < floors[of_what]
        assert "maxUnavailable" not in budget["spec"]
    assert {part for part, floor in floors.items() if floor > 1} == seen - {"controller"}


@pytest.mark.parametrize("name", NAMES)
def test_nobody_reaches_the_metadata_service(rendered: Mapping[str, list[Body]], name: str):
    policies = [b for b in rendered[name] if b["kind"] == "NetworkPolicy"]
    covered: set[str] = set()
    for policy in policies:
        if "Egress" not in policy["spec"]["policyTypes"]:
            continue
        (expression,) = policy["spec"]["podSelector"]["matchExpressions"]
        covered |= set(expression["values"])
        blocks = [
            to["ipBlock"]
            for rule in policy["spec"]["egress"]
            for to in rule.get("to", [])
            if "ipBlock" in to
        ]
        assert blocks and all("169.254.169.254/32" in block["except"] for block in blocks)
        ports = {p["port"] for rule in policy["spec"]["egress"] for p in rule.get("ports", [])}
        assert 53 in ports
    there = {
        p["metadata"]["labels"]["app.kubernetes.io/component"]
        for _, p in pods([b for b in rendered[name] if b["kind"] != "ConfigMap"])
        if "labels" in p["metadata"]
    }
    assert there <= covered


@pytest.mark.parametrize("name", NAMES)
def test_selectors_find_their_pods(rendered: Mapping[str, list[Body]], name: str):
    """Every Service, budget and spread of the chart selects pods that it makes."""
    labels = [p["metadata"].get("labels", {}) for _, p in pods(rendered[name])]
    selectors = [b["spec"]["selector"] for b in rendered[name] if b["kind"] == "Service"]
    selectors += [
        b["spec"]["selector"]["matchLabels"]
        for b in rendered[name]
        if b["kind"] in ("PodDisruptionBudget", "Deployment")
    ]
    selectors += [
        c["labelSelector"]["matchLabels"]
        for _, p in pods(rendered[name])
        for c in p["spec"].get("topologySpreadConstraints", [])
    ]
    assert selectors
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels), selector
