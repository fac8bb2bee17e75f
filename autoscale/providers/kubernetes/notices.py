"""Who says, on a Kubernetes node, that its machine will be taken, and when.

Node termination handlers, node autoscalers and clouds mark nodes in their own ways; a mark that
says since when it is there gives the time of the loss, any other one counts from when it was seen
first.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

Body = Mapping[str, Any]
# Taint -> seconds from the mark to the loss; None: as the settings say.
TAINTS: Mapping[str, float | None] = {
    "aws-node-termination-handler/spot-itn": 120.0,
    "aws-node-termination-handler/scheduled-maintenance": None,
    "aws-node-termination-handler/asg-lifecycle-termination": None,
    "aws-node-termination-handler/rebalance-recommendation": None,
    "cloud.google.com/impending-node-termination": 30.0,
    "karpenter.sh/disrupted": None,
    "ToBeDeletedByClusterAutoscaler": None,
    "node.kubernetes.io/out-of-service": 0.0,
}
# Condition (status True) -> the same.
CONDITIONS: Mapping[str, float | None] = {
    "PreemptScheduled": 30.0,  # Azure's node problem detector
    "TerminateScheduled": None,
    "SpotInterruption": 120.0,
}
# Label and its value -> the same. Termination handlers may be told to label instead of to taint.
LABELS: Mapping[str, float | None] = {
    "aws-node-termination-handler/action=cordon-and-drain": 120.0,
    "cloud.google.com/gke-spot-terminating=true": 30.0,
    "sanderling/doomed=true": None,  # by hand, for drills
}


def doomed_s(node: Body, now_s: float, notice_s: float) -> float | None:
    """When the node's machine is taken, in seconds since 1970; None where nobody says so. The
    earliest of several counts. now_s: for marks that say no time. notice_s: for those that say no
    length."""
    times = [
        (now_s if since is None else since) + (notice_s if lasts is None else lasts)
        for since, lasts in _marks(node)
    ]
    return min(times, default=None)


def _marks(node: Body) -> Iterator[tuple[float | None, float | None]]:
    """(since when, how long) of each."""
    for taint in node.get("spec", {}).get("taints") or ():
        if taint["key"] in TAINTS:
            yield seconds(taint.get("timeAdded")), TAINTS[taint["key"]]
    for condition in node.get("status", {}).get("conditions") or ():
        if condition["type"] in CONDITIONS and condition["status"] == "True":
            yield seconds(condition.get("lastTransitionTime")), CONDITIONS[condition["type"]]
    for name, value in (node["metadata"].get("labels") or {}).items():
        if f"{name}={value}" in LABELS:
            yield None, LABELS[f"{name}={value}"]


def seconds(stamp: str | None) -> float | None:
    """Seconds since 1970 of a Kubernetes time, with or without a fraction."""
    if not stamp:
        return None
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def stamp(at_s: float) -> str:
    """A MicroTime."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
