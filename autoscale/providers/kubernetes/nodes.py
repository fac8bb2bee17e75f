"""Marks on nodes. A node's taints are one list, and a patch replaces all of it: so they are read,
changed and written back under the version that was read."""

import copy
from collections.abc import Callable
from typing import Any

from autoscale.providers.kubernetes.api import Api, Conflict, Missing

Body = dict[str, Any]
NOTICE = "sanderling/notice"
TRIES = 6


def close(api: Api, node: str) -> bool:
    """Nothing new is placed on a node that will be taken: cordoned, and tainted so that it is seen
    why. False where it was so already, or the node is gone."""
    return _changed(api, node, closed)


def closed(node: Body) -> Body:
    """The node's spec, closed; whatever else it says stays."""
    spec = copy.deepcopy(node.get("spec") or {})
    taints = [taint for taint in spec.get("taints") or () if taint["key"] != NOTICE]
    spec["taints"] = [*taints, {"key": NOTICE, "value": "true", "effect": "NoSchedule"}]
    spec["unschedulable"] = True
    return spec


def _changed(api: Api, name: str, change: Callable[[Body], Body]) -> bool:
    """Conflict where others were faster time and again."""
    for left in reversed(range(TRIES)):
        try:
            node = api.get("nodes", name)
            spec = change(node)
            if spec == (node.get("spec") or {}):
                return False
            version = node["metadata"]["resourceVersion"]
            body = {"metadata": {"resourceVersion": version}, "spec": spec}
            api.patch("nodes", name, body)
            return True
        except Missing:
            return False
        except Conflict:
            if not left:
                raise
    raise AssertionError("the last try returns or raises")
