"""Everything that the controller may ask the API server for: the chart's roles are held to this
list, and this list to what is really asked."""

from collections.abc import Mapping
from typing import NamedTuple

CORE, RAY, LEASES = "/api/v1", "/apis/ray.io/v1", "/apis/coordination.k8s.io/v1"


class Right(NamedTuple):
    """Of one resource. own: only the object named as the lease, but for `create`."""

    group: str
    path: str
    namespaced: bool
    verbs: tuple[str, ...]
    own: bool = False


RIGHTS: Mapping[str, Right] = {
    "rayservices": Right("ray.io", RAY, True, ("get",)),
    "rayclusters": Right("ray.io", RAY, True, ("get", "patch")),
    "pods": Right("", CORE, True, ("list", "watch", "patch")),
    "pods/eviction": Right("", CORE, True, ("create",)),
    "events": Right("", CORE, True, ("list",)),
    "configmaps": Right("", CORE, True, ("get", "create", "update"), own=True),
    "leases": Right("coordination.k8s.io", LEASES, True, ("get", "create", "update"), own=True),
    "nodes": Right("", CORE, False, ("list", "watch", "get", "patch")),
}
