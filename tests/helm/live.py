"""A release in a cluster that is only an API server's double, with KubeRay's part played."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helm.chart import CHART, Helm
from tests.helm.tools import Tools
from tests.kubernetes_double import crds
from tests.kubernetes_double.kinds import ApiError
from tests.kubernetes_double.operator import Cloud, Cluster
from tests.kubernetes_double.server import Double
from tests.kubernetes_double.store import At, How

Body = dict[str, Any]
SPACE = "models"
FIELDS = ("replicas", "minReplicas", "maxReplicas")
VALUES = CHART / "examples" / "a10g-spot.yaml"


@dataclass(frozen=True)
class Live:
    """One Helm and one cluster. double.store: what is in it."""

    helm: Helm
    double: Double
    cluster: Cluster

    def do(self, command: str, *flags: str) -> str:
        """install, upgrade, ... of release x, with the values of A10G on spot unless told."""
        chart = (str(CHART), f"--values={VALUES}") if command in ("install", "upgrade") else ()
        return self.helm.run(command, "x", *chart, "--namespace", SPACE, *flags)

    def all(self, group: str, resource: str) -> list[Body]:
        """Objects of a resource in the release's namespace."""
        version = "v1beta1" if group == "apiextensions.k8s.io/v1beta1" else "v1"
        return self.double.store.list(At(group, version, resource, SPACE))[0]

    def derived(self) -> Body:
        """The one RayCluster that the operator has made."""
        (found,) = self.all("ray.io", "rayclusters")
        return found

    def numbers(self) -> dict[str, int]:
        """Replicas of each worker group, as the derived RayCluster says."""
        groups = self.derived()["spec"]["workerGroupSpecs"]
        return {group["groupName"]: group["replicas"] for group in groups}

    def scale(self, group: str, replicas: int, by: str) -> None:
        """As an autoscaler does: a patch of the derived RayCluster under its own name."""
        at = At("ray.io", "v1", "rayclusters", SPACE, self.derived()["metadata"]["name"])

        def more(body: Body) -> Body:
            for each in body["spec"]["workerGroupSpecs"]:
                if each["groupName"] == group:
                    each["replicas"] = replicas
            return body

        self.double.store.update(at, more, How(by))
        self.cluster.tick()

    def managers(self, group: str, resource: str, name: str) -> set[str]:
        """Who has ever written an object."""
        body = self.double.store.get(At(group, "v1", resource, SPACE, name))
        return {entry["manager"] for entry in body["metadata"].get("managedFields", [])}


@contextlib.contextmanager
def release(
    tools: Tools,
    major: int,
    folder: Path,
    definitions: list[Body] | None = None,
    *,
    waits: bool = False,
) -> Iterator[Live]:
    """A cluster with KubeRay's definitions; unless given, small ones of ours. waits: it goes on by
    itself, as Helm's waiting needs; else with each request that changes something."""
    with Double() as double:
        cluster = Cluster(double.store, Cloud(startup_s=0))
        for body in definitions or crds.small():
            double.add(body)
        for kind, name in (("Namespace", SPACE), ("ServiceAccount", "default")):
            body = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
            if kind == "ServiceAccount":
                body["metadata"]["namespace"] = SPACE
            with contextlib.suppress(ApiError):
                double.add(json.loads(json.dumps(body)))
        path = double.kubeconfig(folder / f"kubeconfig{major}", namespace=SPACE)
        found = Live(Helm(tools, major, folder, path), double, cluster)
        if waits:
            with cluster.thread():
                yield found
        else:
            double.after = cluster.tick
            yield found
