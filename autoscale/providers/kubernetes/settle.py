"""From what was asked for and what is there to what is true now and what is to be written: pure.

Pods of a group are alike until one is given to a launch; then the launch is that pod. A pod that is
lost is not replaced (KubeRay would): its launch is gone, and the loop decides.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoscale.providers.kubernetes.ledger import Entry, Ledger
from autoscale.providers.kubernetes.view import Group, Pod

WITHDRAWN_S = 60.0  # a notice whose time is so long past came to nothing


@dataclass(frozen=True)
class Seen:
    """One look. fresh: there was no ledger yet. dooms: node -> when its machine is taken, as it
    says now. Times in seconds since 1970."""

    now_s: float
    cluster: str
    groups: Sequence[Group]
    pods: Sequence[Pod]
    dooms: Mapping[str, float]
    fresh: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a group's spec is to say."""

    replicas: int
    delete: tuple[str, ...]


def settled(ledger: Ledger, seen: Seen) -> Ledger:
    """The ledger with everything that the look tells."""
    if ledger.cluster != seen.cluster:
        ledger = _moved(ledger, seen.cluster)
    ledger = _adopted(ledger, seen)
    ledger = _bound(ledger, seen)
    pods = {pod.name: pod for pod in seen.pods}
    for entry in ledger.entries:
        if entry.gone_s is None:
            ledger = _followed(ledger, entry, pods.get(entry.pod), seen)
    return ledger.pruned(seen.now_s)


def wanted(ledger: Ledger, group: Group, pods: Iterable[Pod]) -> Wanted:
    """As many pods as launches that are not gone; every other one is named for deletion."""
    held = ledger.held(group.name)
    mine = {entry.pod for entry in held}
    waiting = sum(not entry.pod for entry in held)
    spare = [p for p in pods if p.group == group.name and p.name not in mine]
    parted = {e.pod for e in ledger.entries if e.gone_s is not None}
    free = sorted((p for p in spare if p.name not in parted and p.ends_s is None), key=_age)
    delete = {p.name for p in spare if p.name in parted} | {p.name for p in free[waiting:]}
    return Wanted(len(held), tuple(sorted(delete)))


def _moved(ledger: Ledger, cluster: str) -> Ledger:
    """KubeRay has put another cluster in the place of the first: launches are pods of that now."""
    entries = tuple(
        e if e.gone_s is not None else replace(e, pod="", placed=False, ready_s=None, doomed_s=None)
        for e in ledger.entries
    )
    return replace(ledger, cluster=cluster, entries=entries)


def _adopted(ledger: Ledger, seen: Seen) -> Ledger:
    """Pods that tell their token, after a ledger was lost; and everything, before there was one."""
    known = {entry.token for entry in ledger.entries}
    for pod in sorted(seen.pods, key=_age):
        if pod.token and pod.token not in known and pod.ends_s is None and not pod.over:
            ledger = ledger.put(Entry(pod.token, pod.group, pod.made_s, pod.name))
    if not seen.fresh:
        return ledger
    for group in seen.groups:
        there = [p for p in seen.pods if p.group == group.name and p.ends_s is None and not p.over]
        tokens = [f"{group.role}/found/{p.name}" for p in there if not p.token]
        missing = max(0, group.replicas - len(there))
        tokens += [f"{group.role}/found/{seen.cluster}/{group.name}/{n}" for n in range(missing)]
        for token in tokens:
            ledger = ledger.put(Entry(token, group.name, seen.now_s))
    return ledger


def _bound(ledger: Ledger, seen: Seen) -> Ledger:
    """Oldest launch, oldest pod."""
    taken = {entry.pod for entry in ledger.entries}
    for group in seen.groups:
        free = [p for p in seen.pods if p.group == group.name and p.name not in taken]
        free = sorted((p for p in free if p.ends_s is None and not p.over), key=_age)
        waiting = [entry for entry in ledger.held(group.name) if not entry.pod]
        for entry, pod in zip(waiting, free, strict=False):
            ledger = ledger.put(replace(entry, pod=pod.name))
    return ledger


def _followed(ledger: Ledger, entry: Entry, pod: Pod | None, seen: Seen) -> Ledger:
    """What became of one launch."""
    if not entry.pod:
        return ledger
    if pod is None or pod.over:
        return _lost(ledger, entry, seen.now_s)
    if pod.refused and not entry.placed:
        held = len(ledger.held(entry.group)) - 1
        return ledger.without(entry.token).tell(seen.now_s, entry.group, "launch_fail", held)
    if pod.node and not entry.placed:
        entry = replace(entry, placed=True)
        ledger = ledger.put(entry)
        placed = sum(e.placed for e in ledger.held(entry.group))
        ledger = ledger.tell(seen.now_s, entry.group, "launch_ok", placed)
    ready_s = None if pod.ready_s is None else max(pod.ready_s, entry.asked_s)
    entry = replace(entry, ready_s=ready_s if entry.ready_s is None else entry.ready_s)
    return _doomed(ledger.put(entry), entry, pod, seen)


def _lost(ledger: Ledger, entry: Entry, now_s: float) -> Ledger:
    ledger = ledger.put(replace(entry, gone_s=now_s))
    if entry.leaving:
        return ledger
    return ledger.tell(now_s, entry.group, "preempt", len(ledger.held(entry.group)))


def _doomed(ledger: Ledger, entry: Entry, pod: Pod, seen: Seen) -> Ledger:
    """By its node's word, or by that of somebody who evicts it."""
    times = [seen.dooms.get(pod.node), None if entry.leaving else pod.ends_s]
    at_s = min((t for t in times if t is not None), default=None)
    if entry.doomed_s is not None:
        withdrawn = at_s is None and seen.now_s > entry.doomed_s + WITHDRAWN_S
        return ledger.put(replace(entry, doomed_s=None)) if withdrawn else ledger
    if at_s is None:
        return ledger
    ledger = ledger.put(replace(entry, doomed_s=at_s))
    left_s = max(0.0, at_s - seen.now_s)
    return ledger.tell(seen.now_s, entry.group, "notice", left_s)


def _age(pod: Pod) -> tuple[float, str]:
    return pod.made_s, pod.name
