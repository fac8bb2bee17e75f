"""Watches: what happened since a resourceVersion, as it happens; WatchList's initial events."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.kubernetes_double.faults import Faults
from tests.kubernetes_double.kinds import api_version
from tests.kubernetes_double.store import At, Change, Store

Body = dict[str, Any]
Fits = Callable[[Body], bool]
INITIAL = "k8s.io/initial-events-end"
LOOK_S = 0.2  # how soon a watch sees that it was dropped
HOUR_S = 1800.0


class Dropped(Exception):
    """The connection is to end without its last chunk."""


def truth(value: str | None) -> bool:
    """The official Python client writes True."""
    return (value or "").lower() in ("true", "1")


def events(
    store: Store, at: At, query: Mapping[str, str], fits: Fits, faults: Faults
) -> Iterator[bytes]:
    """Lines of JSON; empty ones where nothing happened for a while."""
    since, whole = int(query.get("resourceVersion") or 0), truth(query.get("sendInitialEvents"))
    epoch, end_s = faults.epoch, time.monotonic() + float(query.get("timeoutSeconds") or HOUR_S)
    kind = {"kind": store.kind(at).kind, "apiVersion": api_version(at.group, at.version)}
    with store.lock:
        if since and since < store.floor and not whole:
            yield _line("ERROR", _expired(since, store.floor))
            return
        begun = [] if since and not whole else store.list(at, fits)[0]
        reached = since if since and not whole else store.version
    for body in begun:
        yield _line("ADDED", body)
    if whole:
        metadata = {"resourceVersion": str(reached), "annotations": {INITIAL: "true"}}
        yield _line("BOOKMARK", {**kind, "metadata": metadata})
    while time.monotonic() < end_s:
        fresh, behind = _fresh(store, reached, faults)
        if faults.epoch != epoch:
            raise Dropped
        if behind:
            yield _line("ERROR", _expired(reached, store.floor))
            return
        for change in fresh:
            reached = change.version
            told = _told(change, at, store, fits)
            if told is not None:
                yield told
        yield b""


def _fresh(store: Store, reached: int, faults: Faults) -> tuple[list[Change], bool]:
    with store.changed:
        if faults.frozen or not store.log or store.log[-1].version <= reached:
            store.changed.wait(LOOK_S)
        if faults.frozen:
            return [], False
        if reached < store.floor - 1:
            return [], True
        return [change for change in store.log if change.version > reached], False


def _told(change: Change, at: At, store: Store, fits: Fits) -> bytes | None:
    """As seen through a selector: what begins to fit is added, what fits no more is deleted."""
    if not store.within(change.key, at):
        return None
    was = change.old is not None and fits(change.old)
    now = fits(change.new)
    if change.type == "DELETED":
        return _line("DELETED", change.new) if was or now else None
    if not was and not now:
        return None
    kind = "MODIFIED" if was and now else "ADDED" if now else "DELETED"
    return _line(kind, change.new)


def _expired(asked: int, floor: int) -> Body:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f"too old resource version: {asked} ({floor})",
        "reason": "Expired",
        "code": 410,
    }


def _line(kind: str, body: Body) -> bytes:
    return json.dumps({"type": kind, "object": copy.copy(body)}).encode() + b"\n"
