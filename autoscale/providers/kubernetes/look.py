"""One look at the cluster, and the writes that make it what the ledger says. Blocking.

Every write names the version that it was made from, so of two controllers that look at the same
time one is told to look again; whoever comes last writes what the ledger says by then.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoscale.providers.kubernetes.api import Api, ApiFailed, Conflict, Missing
from autoscale.providers.kubernetes.ledger import KEY, Ledger, Stored, read, written
from autoscale.providers.kubernetes.nodes import close
from autoscale.providers.kubernetes.notices import doomed_s
from autoscale.providers.kubernetes.settle import Seen, settled, wanted
from autoscale.providers.kubernetes.view import (
    MACHINE,
    TOKEN,
    Group,
    Pod,
    groups,
    pod_of,
    refused_pods,
    unplaced,
)
from cluster.settings.kubernetes import KubernetesSettings

Body = dict[str, Any]
Change = Callable[["Look"], Ledger]
TRIES = 10  # of looks, where others write at the same time
TRANSIENT = 6  # of looks, where the server is in trouble
PAUSE_S, LONGEST_S = 0.1, 1.0  # before the second of those, three times as long each time


@dataclass(frozen=True)
class Look:
    """What was seen, and the ledger as that settles it. version: of the RayCluster. pending: the
    cluster of an upgrade under way."""

    stored: Stored
    ledger: Ledger
    seen: Seen
    version: str
    pending: str

    def group(self, name: str) -> Group | None:
        """None where there is none of that name."""
        return next((group for group in self.seen.groups if group.name == name), None)


class Lookout:
    """Looks and writes, for one RayService. wall_s: seconds since 1970. pause: sleeps."""

    def __init__(
        self,
        api: Api,
        settings: KubernetesSettings,
        wall_s: Callable[[], float],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.api, self.settings, self.wall_s, self.pause = api, settings, wall_s, pause

    def look(self, change: Change | None = None) -> Look:
        """Look, change the ledger, and write what follows from it. ApiFailed where others were
        faster, or the server in trouble, time and again; what was written by then is not wrong."""
        conflicts = troubles = 0
        while True:
            try:
                return self._once(change)
            except Conflict:
                conflicts += 1
                if conflicts >= TRIES:
                    raise
            except ApiFailed as error:
                troubles += 1
                if not error.transient or troubles >= TRANSIENT:
                    raise
                self.pause(min(LONGEST_S, error.retry_s or PAUSE_S * 3 ** (troubles - 1)))

    def evict(self, pod: str) -> None:
        """ApiFailed 429 at once where a disruption budget forbids it. An answer that was lost is
        asked for again here: KubeRay makes a new pod as soon as an evicted one is gone, if nobody
        has lowered `replicas` by then."""
        for troubles in range(TRANSIENT):
            try:
                self.api.evict(pod)
                return
            except ApiFailed as error:
                if not (error.transient and error.code != 429) or troubles + 1 == TRANSIENT:
                    raise
                self.pause(min(LONGEST_S, PAUSE_S * 3**troubles))

    def _once(self, change: Change | None) -> Look:
        found = self._see()
        if change is not None:
            found = replace(found, ledger=change(found))
        stored = self._keep(found)
        self._write(found)
        return replace(found, stored=stored)

    def _see(self) -> Look:
        service = self.api.get("rayservices", self.settings.service)
        active, pending = _clusters(service)
        if not active:
            raise ValueError(
                f"the RayService {self.settings.service!r} (autoscale.kubernetes.service) has no "
                "RayCluster yet"
            )
        stored = self._stored()  # before the pods: who launches writes here first
        cluster = self.api.get("rayclusters", active)
        pods, now_s = self._pods(active), self.wall_s()
        fresh = not stored.version
        seen = Seen(now_s, active, groups(cluster), pods, self._dooms(pods, now_s), fresh)
        version = cluster["metadata"]["resourceVersion"]
        return Look(stored, settled(stored.ledger, seen), seen, version, pending)

    def _stored(self) -> Stored:
        try:
            found = self.api.get("configmaps", self.settings.lease)
        except Missing:
            return Stored()
        text = (found.get("data") or {}).get(KEY, "{}")
        where = f"the ConfigMap {self.settings.lease!r}"
        return Stored(read(text, where), found["metadata"]["resourceVersion"])

    def _pods(self, cluster: str) -> tuple[Pod, ...]:
        selector = f"ray.io/cluster={cluster},ray.io/node-type=worker"
        found = self.api.list("pods", labelSelector=selector)["items"]
        refused: frozenset[str] = frozenset()
        if any(map(unplaced, found)):
            refused = refused_pods(self.api.list("events", fieldSelector=OF_PODS))
        return tuple(pod_of(body, refused) for body in found)

    def _dooms(self, pods: tuple[Pod, ...], now_s: float) -> Mapping[str, float]:
        used = {pod.node for pod in pods if pod.node}
        if not used:
            return {}
        notice_s = self.settings.notice_s
        told = {
            node["metadata"]["name"]: doomed_s(node, now_s, notice_s)
            for node in self.api.list("nodes")["items"]
            if node["metadata"]["name"] in used
        }
        return {name: at_s for name, at_s in told.items() if at_s is not None}

    def _keep(self, found: Look) -> Stored:
        """The ledger before anything that follows from it."""
        if found.ledger == found.stored.ledger and found.stored.version:
            return found.stored
        metadata: Body = {"name": self.settings.lease}
        body: Body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        body["data"] = {KEY: written(found.ledger)}
        if found.stored.version:
            metadata["resourceVersion"] = found.stored.version
            made = self.api.replace("configmaps", body)
        else:
            made = self.api.create("configmaps", body)
        return Stored(found.ledger, made["metadata"]["resourceVersion"])

    def _write(self, found: Look) -> None:
        seen = found.seen
        self._scale(seen.cluster, found.version, found, seen.groups, seen.pods)
        if found.pending:
            self._carry(found)
        for node in seen.dooms:
            if any(e.pod == p.name for e in _open(found) for p in seen.pods if p.node == node):
                close(self.api, node)
        for entry in _open(found):
            pod = next((p for p in seen.pods if p.name == entry.pod), None)
            if pod is not None and (pod.token, pod.machine) != (entry.token, entry.id):
                marks = {"labels": {MACHINE: entry.id}, "annotations": {TOKEN: entry.token}}
                with contextlib.suppress(Missing):  # the next look says what became of it
                    self.api.patch("pods", pod.name, {"metadata": marks})

    def _carry(self, found: Look) -> None:
        """An upgrade's new cluster comes with as many workers as the old one has."""
        try:
            body = self.api.get("rayclusters", found.pending)
        except Missing:
            return
        version = body["metadata"]["resourceVersion"]
        self._scale(found.pending, version, found, groups(body), ())

    def _scale(
        self,
        name: str,
        version: str,
        found: Look,
        of: Sequence[Group],
        pods: Sequence[Pod],
    ) -> None:
        """Replicas, and which pods are to go. Nothing is written where all is so already."""
        patch: list[Body] = []
        for group in of:
            want = wanted(found.ledger, group, pods)
            if (want.replicas, want.delete) == (group.replicas, group.delete) and not group.bound:
                continue
            at = f"/spec/workerGroupSpecs/{group.place}"
            patch += [
                _set(f"{at}/replicas", want.replicas),
                _set(f"{at}/minReplicas", 0),
                _set(f"{at}/scaleStrategy", {"workersToDelete": list(want.delete)}),
            ]
        if patch:
            guard = _set("/metadata/resourceVersion", version)
            self.api.patch("rayclusters", name, [guard, *patch])


OF_PODS = "involvedObject.kind=Pod"


def _clusters(service: Body) -> tuple[str, str]:
    """Names of the cluster that serves, and of the one that will. Before the first serves, it is
    the one that counts."""
    status = service.get("status") or {}
    active = (status.get("activeServiceStatus") or {}).get("rayClusterName") or ""
    pending = (status.get("pendingServiceStatus") or {}).get("rayClusterName") or ""
    return (active, pending if pending != active else "") if active else (pending, "")


def _open(found: Look) -> list[Any]:
    return [entry for entry in found.ledger.entries if entry.gone_s is None and entry.pod]


def _set(path: str, value: Any) -> Body:
    return {"op": "add", "path": path, "value": value}
