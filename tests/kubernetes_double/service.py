"""A RayService with two worker groups, as the chart makes one."""

from typing import Any

from tests.kubernetes_double import crds
from tests.kubernetes_double.server import Double

Body = dict[str, Any]
NAME = "sanderling-serve"


def group(name: str, market: str, most: int, usd: float, replicas: int = 0) -> Body:
    """A worker group that is an offer."""
    labels = {
        "sanderling/offer": name,
        "sanderling/kind": "a10g",
        "sanderling/market": market,
        "sanderling/usd-per-h": str(usd),
        "sanderling/gpus": "1",
        "sanderling/startup-s": "60",
        "sanderling/role": "decode",
    }
    template = {"metadata": {"labels": {"app": "sanderling"}}, "spec": _pod()}
    bounds = {"replicas": replicas, "minReplicas": 0, "maxReplicas": most}
    start = {"rayStartParams": {}}
    return {"groupName": name, "labels": labels, "template": template, **bounds, **start}


def ray_service(*groups: Body, name: str = NAME, namespace: str = "default") -> Body:
    """One that has these groups, and one for the ingress that is nobody's offer."""
    ingress = group("ingress", "on_demand", 1, 0.1, replicas=1)
    ingress["labels"]["sanderling/role"] = "ingress"
    head = {"rayStartParams": {}, "template": {"spec": _pod()}}
    config = {"headGroupSpec": head, "workerGroupSpecs": [*groups, ingress]}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"rayClusterConfig": config},
    }


def install(double: Double, *groups: Body, namespace: str = "default") -> None:
    """Definitions and one RayService."""
    for definition in crds.small():
        double.add(definition)
    double.add(ray_service(*groups, namespace=namespace))


def _pod() -> Body:
    return {"containers": [{"name": "ray", "image": "sanderling"}]}
