"""The rest of a cluster beside its API: KubeRay's operator, the scheduler, kubelets, a cloud that
has so many machines and takes some back, and what makes Deployments and Jobs come true.

`tick()` does all that is due; `Cluster.thread()` ticks whenever something changed, and a Double
whose `after` is `tick` has a cluster that is never late. It writes to the store as an admin would.
"""

import contextlib
import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.kubernetes_double.kinds import ApiError
from tests.kubernetes_double.store import At, How, Store

Body = dict[str, Any]
RAY = ("ray.io", "v1")
LIVE = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")  # what no upgrade is made for
SPOT_TAINT = "aws-node-termination-handler/spot-itn"
HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
GROUPS = "ray.io/num-worker-groups"
NOW = How("kubelet", grace_s=0)
BY = How("kuberay-operator")


@dataclass
class Limit:
    """From at_s on, a worker group has so many machines."""

    at_s: float
    group: str
    machines: int


@dataclass
class Cloud:
    """notice_s: how long before a loss it is told; notify: how (the node, the time it is taken)."""

    notice_s: float = 120.0
    startup_s: float = 60.0
    seed: int = 0
    limits: list[Limit] = field(default_factory=list)
    notify: Callable[[Body, str], None] | None = None

    def has(self, group: str, at_s: float) -> int | None:
        """Machines of a group at a time; None for no limit."""
        found = [each for each in self.limits if each.group == group and each.at_s <= at_s]
        return found[-1].machines if found else None


class Cluster:
    """recreates: KubeRay makes a new pod for one that is only on its way out (it does not, by
    default: a pod counts until it is gone)."""

    def __init__(
        self, store: Store, cloud: Cloud | None = None, *, recreates: bool = False
    ) -> None:
        self.store, self.cloud, self.recreates = store, cloud or Cloud(), recreates
        store.graceful = True
        self.grace_s = 0.0  # how long a kubelet takes to end a pod
        self.made = 0  # pods of workers that were ever made
        self._taken: dict[str, float] = {}  # node -> when it is taken
        self._dice = random.Random(self.cloud.seed)
        self._busy = threading.RLock()

    @contextlib.contextmanager
    def thread(self) -> Iterator["Cluster"]:
        """Ticks until the end of the `with`."""
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with self.store.changed:
                    before = self.store.version
                self.tick()
                with self.store.changed:
                    if self.store.version == before:
                        self.store.changed.wait(0.05)

        worker = threading.Thread(target=work, name="cluster")
        worker.start()
        try:
            yield self
        finally:
            stop.set()
            worker.join()

    def tick(self) -> None:
        """All that is due, until nothing changes any more."""
        collect = self.store.collect_orphans
        made = (self._services, self._clusters, self._schedule)
        parts = (self._market, self._kubelets, *made, collect)
        with self._busy:
            for _ in range(20):
                before = self.store.version
                for part in (*parts, self._others):
                    with contextlib.suppress(ApiError):  # somebody was faster; next time
                        part()
                if self.store.version == before:
                    return

    def limit(self, group: str, machines: int, in_s: float = 0.0) -> None:
        """From in_s on a group has so many machines."""
        self.cloud.limits.append(Limit(self.store.now_s() + in_s, group, machines))

    def doom(self, node: str, in_s: float) -> None:
        """Give notice for one node."""
        if node not in self._taken:
            self._taken[node] = self.store.now_s() + in_s
            self._notify(node, self.store.now_s())

    def workers(self, group: str | None = None) -> list[Body]:
        """Pods of workers."""
        pods = self.store.list(At("", "v1", "pods"))[0]
        labels = [pod["metadata"].get("labels") or {} for pod in pods]
        return [
            pod
            for pod, of in zip(pods, labels, strict=True)
            if of.get("ray.io/node-type") == "worker" and group in (None, of.get("ray.io/group"))
        ]

    # The market.

    def _market(self) -> None:
        now_s = self.store.now_s()
        for place, limit in enumerate(self.cloud.limits):
            later = [e for e in self.cloud.limits[place + 1 :] if e.group == limit.group]
            past = any(limit.at_s <= e.at_s <= now_s for e in later)
            if now_s + self.cloud.notice_s + 1e-6 >= limit.at_s and not past:
                self._doom_for(limit, now_s)
        for name, at_s in list(self._taken.items()):
            if at_s <= now_s + 1e-6:
                del self._taken[name]
                self._take(name)

    def _doom_for(self, limit: Limit, now_s: float) -> None:
        """Notice to as many as there will be too many; one that was given is not given again."""
        nodes = [pod["spec"]["nodeName"] for pod in self.workers(limit.group) if _placed(pod)]
        staying = [name for name in nodes if self._taken.get(name, 1e18) > limit.at_s + 1e-6]
        for name in self._dice.sample(staying, max(0, len(staying) - limit.machines)):
            self._taken[name] = max(limit.at_s, now_s)
            self._notify(name, min(now_s, limit.at_s - self.cloud.notice_s))

    def _notify(self, name: str, at_s: float) -> None:
        added = datetime.fromtimestamp(max(at_s, self.store.now_s() - 3600), UTC)
        stamp = added.strftime("%Y-%m-%dT%H:%M:%SZ")

        def told(node: Body) -> Body:
            if self.cloud.notify is not None:
                self.cloud.notify(node, stamp)
                return node
            taint = {"key": SPOT_TAINT, "effect": "NoSchedule", "timeAdded": stamp}
            node["spec"]["taints"] = [*(node["spec"].get("taints") or ()), taint]
            return node

        at, how = At("", "v1", "nodes", None, name), How("node-termination-handler")
        self.store.update(at, told, how)
        self.store.update(At("", "v1", "nodes", None, name, "status"), told, how)

    def _take(self, node: str) -> None:
        for pod in self.store.list(At("", "v1", "pods"))[0]:
            if pod["spec"].get("nodeName") == node:
                self.store.delete(_pod(pod), NOW)
        with contextlib.suppress(ApiError):
            self.store.delete(At("", "v1", "nodes", None, node), NOW)

    # Scheduler and kubelets: one node for each worker, one for all else.

    def _schedule(self) -> None:
        now_s = self.store.now_s()
        for pod in self.store.list(At("", "v1", "pods"))[0]:
            if _placed(pod) or pod["metadata"].get("deletionTimestamp"):
                continue
            labels = pod["metadata"].get("labels") or {}
            if labels.get("ray.io/node-type") != "worker":
                self._bind(pod, "system")
                continue
            group = labels["ray.io/group"]
            there = self.cloud.has(group, now_s)
            on_nodes = sum(map(_placed, self.workers(group)))
            if there is not None and on_nodes >= there:
                self._refuse(pod)
            else:
                self._bind(pod, f"node-of-{pod['metadata']['name']}")

    def _bind(self, pod: Body, node: str) -> None:
        with contextlib.suppress(ApiError):
            labels = {"kubernetes.io/hostname": node}
            body = {"metadata": {"name": node, "labels": labels}, "spec": {}}
            self.store.create(At("", "v1", "nodes"), body)

        def bound(body: Body) -> Body:
            body["spec"]["nodeName"] = node
            body["metadata"].setdefault("annotations", {})["double/asked"] = str(self.store.now_s())
            return body

        self.store.update(_pod(pod), bound, How("scheduler"))
        self._say(pod, "PodScheduled", "True", "")

    def _refuse(self, pod: Body) -> None:
        name = pod["metadata"]["name"]
        event = {
            "metadata": {"name": f"{name}.unplaced"},
            "involvedObject": {"kind": "Pod", "name": name, "namespace": _space(pod)},
            "reason": "NotTriggerScaleUp",
            "message": "pod didn't trigger scale-up: 1 max node group size reached",
            "type": "Normal",
            "lastTimestamp": self.store.stamp(),
        }
        with contextlib.suppress(ApiError):
            self.store.create(At("", "v1", "events", _space(pod)), event)
        self._say(pod, "PodScheduled", "False", "Unschedulable")

    def _kubelets(self) -> None:
        now_s = self.store.now_s()
        for pod in self.store.list(At("", "v1", "pods"))[0]:
            metadata = pod["metadata"]
            if stamp := metadata.get("deletionTimestamp"):
                asked_s = _seconds(stamp) - metadata.get("deletionGracePeriodSeconds", 0)
                if now_s >= asked_s + self.grace_s:
                    self.store.delete(_pod(pod), NOW)
                    self._forget_node(pod)
                continue
            if not _placed(pod) or pod["status"]["phase"] in ("Succeeded", "Failed"):
                continue
            worker = (metadata.get("labels") or {}).get("ray.io/node-type") == "worker"
            asked_s = float(metadata["annotations"].get("double/asked", now_s))
            if now_s >= asked_s + (self.cloud.startup_s if worker else 0.0):
                self._run(pod)

    def _forget_node(self, pod: Body) -> None:
        """Nobody pays for the machine of a worker that is gone."""
        node = pod["spec"]["nodeName"]
        if node.startswith("node-of-"):
            self._taken.pop(node, None)
            with contextlib.suppress(ApiError):
                self.store.delete(At("", "v1", "nodes", None, node), NOW)

    def _run(self, pod: Body) -> None:
        """Ready; a pod that is to end (a Job's, a test hook's) has succeeded."""
        ends = pod["spec"].get("restartPolicy") in ("Never", "OnFailure")
        phase = "Succeeded" if ends else "Running"
        self._say(pod, "Ready", "False" if ends else "True", "", phase)

    def _say(self, pod: Body, kind: str, status: str, reason: str, phase: str = "") -> None:
        def said(body: Body) -> Body:
            conditions = body["status"].setdefault("conditions", [])
            mine = next((c for c in conditions if c["type"] == kind), None)
            if mine is None or mine["status"] != status:
                fresh = {"type": kind, "status": status, "reason": reason}
                fresh["lastTransitionTime"] = self.store.stamp()
                body["status"]["conditions"] = [c for c in conditions if c is not mine] + [fresh]
            if phase:
                body["status"]["phase"] = phase
            return body

        self.store.update(_pod(pod, "status"), said, How("kubelet"))

    # KubeRay.

    def _clusters(self) -> None:
        for cluster in self.store.list(At(*RAY, "rayclusters"))[0]:
            self._pods_of(cluster)
            spec = cluster["spec"]
            wanted = sum(map(_replicas, spec.get("workerGroupSpecs") or ()))
            ready = [p for p in self._members(cluster) if _is_ready(p)]
            status = {
                "state": "ready",
                "desiredWorkerReplicas": wanted,
                "availableWorkerReplicas": len(ready),
                "observedGeneration": cluster["metadata"]["generation"],
            }
            self._status("rayclusters", cluster, status)

    def _members(self, cluster: Body, group: str | None = None) -> list[Body]:
        name = cluster["metadata"]["name"]
        return [p for p in self.workers(group) if p["metadata"]["labels"]["ray.io/cluster"] == name]

    def _pods_of(self, cluster: Body) -> None:
        spec = cluster["spec"]
        heads = [
            pod
            for pod in self.store.list(At("", "v1", "pods", _space(cluster)))[0]
            if (pod["metadata"].get("labels") or {}).get("ray.io/cluster")
            == cluster["metadata"]["name"]
            and pod["metadata"]["labels"]["ray.io/node-type"] == "head"
        ]
        if not heads:
            self._make(cluster, "head", "headgroup", spec["headGroupSpec"]["template"])
        for group in spec.get("workerGroupSpecs") or ():
            self._group(cluster, group)

    def _group(self, cluster: Body, group: Body) -> None:
        name, wanted = group["groupName"], _replicas(group)
        leaving = (group.get("scaleStrategy") or {}).get("workersToDelete") or ()
        for pod in self._members(cluster, name):
            failed = pod["status"]["phase"] in ("Failed", "Succeeded")
            if (pod["metadata"]["name"] in leaving or failed) and not _dying(pod):
                self.store.delete(_pod(pod), BY)
        there = [p for p in self._members(cluster, name) if not (self.recreates and _dying(p))]
        for _ in range(wanted - len(there)):
            self._make(cluster, "worker", name, group["template"], group.get("labels") or {})
        standing = [pod for pod in there if not _dying(pod)]
        surplus = len(there) - wanted - (len(there) - len(standing))
        for pod in self._dice.sample(standing, max(0, surplus)):
            self.store.delete(_pod(pod), BY)  # KubeRay, too, takes any

    def _make(
        self, cluster: Body, kind: str, group: str, template: Body, more: Body | None = None
    ) -> None:
        name = cluster["metadata"]["name"]
        metadata = json.loads(json.dumps(template.get("metadata") or {}))
        labels = {
            **(metadata.get("labels") or {}),
            **(more or {}),
            "ray.io/cluster": name,
            "ray.io/node-type": kind,
            "ray.io/group": group,
        }
        made = {
            "metadata": {
                "generateName": f"{name}-{group}-{kind}-",
                "labels": labels,
                "annotations": metadata.get("annotations") or {},
                "ownerReferences": [_owner(cluster)],
            },
            "spec": template.get("spec") or {},
        }
        self.made += kind == "worker"
        self.store.create(At("", "v1", "pods", _space(cluster)), made, BY)

    def _services(self) -> None:
        for service in self.store.list(At(*RAY, "rayservices"))[0]:
            self._service(service)

    def _service(self, service: Body) -> None:
        status = service.get("status") or {}
        active = (status.get("activeServiceStatus") or {}).get("rayClusterName", "")
        pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName", "")
        name = self._current(service, pending or active)
        place = At(*RAY, "rayclusters", _space(service), name)
        if self.store.key(place) not in self.store.objects:
            self.store.create(place, _cluster_of(service, name), BY)
            pending = name
        ready = self._answers(self.store.get(place))
        if pending == name and ready:
            if active and active != name:
                self.store.delete(At(*RAY, "rayclusters", _space(service), active), BY)
            active, pending = name, ""
        said = {
            "activeServiceStatus": {"rayClusterName": active},
            "pendingServiceStatus": {"rayClusterName": pending},
            "serviceStatus": "Running" if active else "",
            "observedGeneration": service["metadata"]["generation"],
            "conditions": [{"type": "Ready", "status": str(bool(active)), "reason": "Known"}],
        }
        self._status("rayservices", service, said)

    def _current(self, service: Body, known: str) -> str:
        """The cluster that fits: the one there is, also where groups were appended (then all of it
        is written anew, live numbers and annotations included), or a new one."""
        config = service["spec"]["rayClusterConfig"]
        fresh = f"{service['metadata']['name']}-{_hash(config)}"
        if not known:
            return fresh
        at = At(*RAY, "rayclusters", _space(service), known)
        marks = self.store.get(at)["metadata"].get("annotations") or {}
        if marks.get(HASH) == _hash(config):
            return known
        first = json.loads(json.dumps(config))
        del first["workerGroupSpecs"][int(marks.get(GROUPS, 0)) :]
        if marks.get(HASH) != _hash(first):
            return fresh
        goal = _cluster_of(service, known)

        def rewritten(old: Body) -> Body:
            old["spec"] = json.loads(json.dumps(goal["spec"]))
            old["metadata"] |= {k: goal["metadata"][k] for k in ("labels", "annotations")}
            return old

        self.store.update(at, rewritten, BY)
        return known

    def _answers(self, cluster: Body) -> bool:
        groups = cluster["spec"].get("workerGroupSpecs") or ()
        wanted = sum(map(_replicas, groups))
        return sum(map(_is_ready, self._members(cluster))) >= wanted

    def _status(self, resource: str, body: Body, status: Body) -> None:
        name = body["metadata"]["name"]
        at = At(*RAY, resource, _space(body), name, "status")
        self.store.update(at, lambda old: {**old, "status": status}, BY)

    # Deployments and Jobs.

    def _others(self) -> None:
        for body in self.store.list(At("apps", "v1", "deployments"))[0]:
            self._deployment(body)
        for body in self.store.list(At("batch", "v1", "jobs"))[0]:
            status = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
            self._set_status("batch", "jobs", body, status)

    def _deployment(self, body: Body) -> None:
        """A ReplicaSet of its template, all of whose pods are there (there are none)."""
        many = body["spec"].get("replicas", 1)
        template = json.loads(json.dumps(body["spec"]["template"]))
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:9]
        template.setdefault("metadata", {}).setdefault("labels", {})["pod-template-hash"] = digest
        name = f"{body['metadata']['name']}-{digest}"
        place = At("apps", "v1", "replicasets", _space(body), name)
        if self.store.key(place) not in self.store.objects:
            labels = template["metadata"]["labels"]
            metadata = {"name": name, "labels": labels, "ownerReferences": [_owner(body)]}
            selector = {"matchLabels": labels}
            spec = {"replicas": many, "template": template, "selector": selector}
            self.store.create(place, {"metadata": metadata, "spec": spec}, How("deployments"))
        counts = dict.fromkeys(("replicas", "readyReplicas", "availableReplicas"), many)
        replica_set = self.store.get(place)
        seen = {"observedGeneration": replica_set["metadata"]["generation"]}
        self._set_status("apps", "replicasets", replica_set, {**counts, **seen})
        seen = {"observedGeneration": body["metadata"]["generation"], "updatedReplicas": many}
        conditions = [{"type": "Available", "status": "True"}]
        self._set_status("apps", "deployments", body, {**counts, **seen, "conditions": conditions})

    def _set_status(self, group: str, resource: str, body: Body, status: Body) -> None:
        at = At(group, "v1", resource, _space(body), body["metadata"]["name"], "status")
        self.store.update(at, lambda old: {**old, "status": status}, How(resource))


def _cluster_of(service: Body, name: str) -> Body:
    """The RayCluster of a RayService."""
    config = json.loads(json.dumps(service["spec"]["rayClusterConfig"]))
    origin = {"ray.io/originated-from-cr-name": service["metadata"]["name"]}
    many = len(config.get("workerGroupSpecs") or ())
    metadata = {
        "name": name,
        "ownerReferences": [_owner(service)],
        "labels": {**origin, "ray.io/originated-from-crd": "RayService"},
        "annotations": {HASH: _hash(config), GROUPS: str(many)},
    }
    return {"metadata": metadata, "spec": config}


def _replicas(group: Body) -> int:
    """Within its bounds, as KubeRay takes them."""
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 1 << 31)
    return int(min(max(group.get("replicas") or 0, least), most))


def _hash(config: Body) -> str:
    """Of all that a new cluster is made for."""
    bare = json.loads(json.dumps(config))
    for group in bare.get("workerGroupSpecs") or ():
        for key in LIVE:
            group.pop(key, None)
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()[:5]


def _owner(body: Body) -> Body:
    metadata = body["metadata"]
    about = {"apiVersion": body["apiVersion"], "kind": body["kind"], "controller": True}
    return {**about, "name": metadata["name"], "uid": metadata["uid"]}


def _space(body: Body) -> str:
    return str(body["metadata"]["namespace"])


def _pod(pod: Body, sub: str = "") -> At:
    return At("", "v1", "pods", _space(pod), pod["metadata"]["name"], sub)


def _placed(pod: Body) -> bool:
    return bool(pod["spec"].get("nodeName"))


def _dying(pod: Body) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _is_ready(pod: Body) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _seconds(stamp: str) -> float:
    return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
