"""What the API server shows, as plain values: worker groups as offers, worker pods, their nodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from autoscale.catalog.offer import Market, Offer
from autoscale.providers.kubernetes.notices import seconds

Body = Mapping[str, Any]
UNLIMITED = 2_147_483_647  # the CRD's default of maxReplicas
TOKEN, MACHINE = "sanderling/token", "sanderling/machine"
ROLES = {"decode": "decode", "prefill": "prefill", "any": "decode"}
MARKETS = ("on_demand", "spot", "reserved")
NO_SCALE_UP = ("NotTriggerScaleUp", "FailedScaleUp", "InsufficientCapacityError")


@dataclass(frozen=True)
class Group:
    """A worker group. role: what a pod that nobody asked for is for. replicas, delete: as they are
    in the RayCluster; bound: its minReplicas is not 0, which KubeRay would hold us to."""

    offer: Offer
    role: str
    place: int
    replicas: int
    delete: tuple[str, ...]
    bound: bool

    @property
    def name(self) -> str:
        """The group's, which is the offer's."""
        return self.offer.name


@dataclass(frozen=True)
class Pod:
    """A worker pod. refused: no machine can be had for it. ends_s: when it ends, where somebody
    has asked it to. over: it runs no more."""

    name: str
    group: str
    made_s: float
    token: str
    machine: str
    node: str
    ready_s: float | None
    ends_s: float | None
    over: bool
    refused: bool


def groups(cluster: Body) -> tuple[Group, ...]:
    """Those that say on which market they are. ValueError where one says it wrongly."""
    specs = cluster["spec"].get("workerGroupSpecs") or ()
    found = [_group(spec, place) for place, spec in enumerate(specs)]
    return tuple(group for group in found if group is not None)


def _group(spec: Body, place: int) -> Group | None:
    name = spec["groupName"]
    labels = {**(spec["template"].get("metadata", {}).get("labels") or {}), **_labels(spec)}
    role, market = labels.get("sanderling/role", "any"), labels.get("sanderling/market")
    if market is None or role not in ROLES:
        return None  # not ours: the ingress', or somebody's own
    if market not in MARKETS or spec.get("numOfHosts", 1) != 1:
        raise ValueError(
            f"worker group {name!r}: sanderling/market = {market!r}, numOfHosts = "
            f"{spec.get('numOfHosts', 1)}; {', '.join(MARKETS)} and 1 are accepted"
        )
    most = spec.get("maxReplicas", UNLIMITED)
    offer = Offer(
        name,
        labels.get("sanderling/kind", "cpu"),
        int(_number(name, labels, "sanderling/gpus", 1)),
        labels.get("sanderling/region", "cluster"),
        labels.get("sanderling/zone", "any"),
        cast(Market, market),
        _number(name, labels, "sanderling/usd-per-h", 0.0),
        None if most >= UNLIMITED else most,
        _number(name, labels, "sanderling/startup-s", 300.0),
        source="the worker group's labels",
    )
    leaving = (spec.get("scaleStrategy") or {}).get("workersToDelete") or ()
    bound = bool(spec.get("minReplicas"))
    return Group(offer, ROLES[role], place, spec.get("replicas") or 0, tuple(leaving), bound)


def _labels(spec: Body) -> Body:
    return spec.get("labels") or {}


def _number(group: str, labels: Body, name: str, default: float) -> float:
    text = labels.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ValueError(f"worker group {group!r}: {name} = {text!r}; a number from 0 is accepted")
    return value


def pod_of(body: Body, refused: frozenset[str]) -> Pod:
    """refused: names of pods for which a machine could not be had."""
    metadata, status = body["metadata"], body.get("status", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    ready = conditions.get("Ready", {})
    node = body["spec"].get("nodeName") or ""
    return Pod(
        metadata["name"],
        labels.get("ray.io/group", ""),
        seconds(metadata.get("creationTimestamp")) or 0.0,
        annotations.get(TOKEN, ""),
        labels.get(MACHINE, ""),
        node,
        seconds(ready.get("lastTransitionTime")) if ready.get("status") == "True" else None,
        seconds(metadata.get("deletionTimestamp")),
        status.get("phase") in ("Failed", "Succeeded"),
        not node and metadata["name"] in refused,
    )


def unplaced(body: Body) -> bool:
    """Whether the scheduler has found no node for a pod."""
    conditions = body.get("status", {}).get("conditions") or ()
    return not body["spec"].get("nodeName") and any(
        c["type"] == "PodScheduled" and c["status"] == "False" for c in conditions
    )


def refused_pods(events: Body) -> frozenset[str]:
    """Pods for which a node autoscaler said that it gets no machine."""
    return frozenset(
        event["involvedObject"].get("name", "")
        for event in events["items"]
        if event.get("reason") in NO_SCALE_UP
    )
