"""The Kubernetes provider over the API server's double, whose cluster is never late, on a virtual
clock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoscale.catalog.offer import Offer
from autoscale.providers.kubernetes.api import Api, connect
from autoscale.providers.kubernetes.provider import KubernetesProvider
from autoscale.providers.kubernetes.view import groups
from autoscale.providers.provider import Provider
from cluster.clock import VirtualClock
from cluster.settings.kubernetes import KubernetesSettings
from tests.autoscale.providers.suite import NOTICE_S, STARTUP_S
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.service import group, install
from tests.kubernetes_double.store import At, Store

EPOCH_S = 1_800_000_000.0
GROUPS = (group("spot-a", "spot", 4, 0.2), group("on-demand", "on_demand", 2**31 - 1, 0.5))


class KubernetesSite:
    """See Site. notify: how the cloud marks a node (Cloud)."""

    def __init__(self, folder: Path, notify: Callable[[Any, str], None] | None = None) -> None:
        self.clock = VirtualClock(start_s=1000.0)
        self.double = Double(Store(self.wall_s))
        self.double.__enter__()
        # A notice's length is the taint's, 120 s of a spot machine on AWS, unless told otherwise.
        cloud = Cloud(notice_s=NOTICE_S, startup_s=STARTUP_S, notify=notify or gke)
        self.cluster = Cluster(self.double.store, cloud)
        # A kubelet ends no pod in the very moment in which it is evicted. Were it so, KubeRay would
        # make a new one before `replicas` is lowered: kubernetes_faults.py has that.
        self.cluster.grace_s = 1.0
        install(self.double, *GROUPS)
        self.cluster.tick()
        self.double.after = self.cluster.tick
        self.folder = folder
        self.wrap: Callable[[Provider], Provider] = lambda provider: provider
        self.provider = self.again()
        cluster = self.double.store.list(At("ray.io", "v1", "rayclusters"))[0][0]
        offers = {each.name: each.offer for each in groups(cluster)}
        self.spot: Offer = offers["spot-a"]
        self.other: Offer = offers["on-demand"]

    def wall_s(self) -> float:
        return EPOCH_S + self.clock.now_s()

    def api(self) -> Api:
        """A connection of its own."""
        config = self.double.kubeconfig(self.folder / "kubeconfig")
        return connect(KubernetesSettings(kubeconfig=str(config), namespace="default"))

    def again(self) -> Provider:
        settings = KubernetesSettings(notice_s=NOTICE_S)
        return self.wrap(KubernetesProvider(self.api(), settings, self.clock, self.wall_s))

    async def passes(self, duration_s: float) -> None:
        for _ in range(10):
            await self.clock.advance(duration_s / 10)
            self.cluster.tick()

    def limit(self, machines: int, in_s: float = 0.0) -> None:
        self.cluster.limit("spot-a", machines, in_s)
        self.cluster.tick()

    def alive(self) -> set[str]:
        """What runs on a machine, by the label that says which launch it answers to."""
        pods = [*self.cluster.workers("spot-a"), *self.cluster.workers("on-demand")]
        return {
            pod["metadata"]["labels"].get("sanderling/machine", pod["metadata"]["name"])
            for pod in pods
            if pod["spec"].get("nodeName") and not pod["metadata"].get("deletionTimestamp")
        }

    def now_s(self) -> float:
        return self.clock.now_s()

    def close(self) -> None:
        self.double.__exit__()


def gke(node: Any, since: str) -> None:
    """Google's mark, which says 30 s."""
    key = "cloud.google.com/impending-node-termination"
    taints = node["spec"].setdefault("taints", [])
    if all(taint["key"] != key for taint in taints):
        taints.append({"key": key, "effect": "NoSchedule", "timeAdded": since})
