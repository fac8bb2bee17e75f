"""What happened to the replicas of late, for people: the page at / and `sanderling status`.

Owns a bounded list, newest last, made by comparing each directory with the one before it, and the
counts of lost and drained replicas. Called by the ingress, so nothing is asked of the controller.
"""

from collections import deque
from typing import Any, Literal, NamedTuple

from cluster.clock import Clock
from serve.directory import Directory, Entry

KEPT = 50
Kind = Literal["starting", "ready", "draining", "drained", "lost", "resumed"]


class Event(NamedTuple):
    """One thing that happened; `number` counts from 1 and never repeats."""

    number: int
    at_s: float
    kind: Kind
    replica_id: str
    text: str


class Events:
    """The last KEPT events of one ingress."""

    def __init__(self, clock: Clock) -> None:
        self.lost = 0
        self.drained = 0
        self._clock = clock
        self._numbers = 0
        self._events: deque[Event] = deque(maxlen=KEPT)

    def compare(self, before: Directory, after: Directory) -> None:
        """Note what differs between two directories that follow each other."""
        for entry in after.entries:
            old = before.find(entry.replica_id)
            if old is None or old.phase != entry.phase:
                self._note(entry.phase, entry.replica_id)
        for entry in before.entries:
            if after.find(entry.replica_id) is None:
                self._gone(entry, after.trouble or "")

    def resumed(self, request_id: str) -> None:
        """A request goes on at another replica."""
        self._note("resumed", "", request_id)

    def counters(self) -> dict[str, float]:
        """By the names of serve.observe.STATUS_METRICS."""
        return {"replicas_lost": float(self.lost), "replicas_drained": float(self.drained)}

    def listed(self) -> list[dict[str, Any]]:
        """Plain values, oldest first; ages instead of times, which mean nothing elsewhere."""
        now_s = self._clock.now_s()
        return [
            {
                "number": event.number,
                "age_s": round(now_s - event.at_s, 3),
                "kind": event.kind,
                "replica_id": event.replica_id,
                "text": event.text,
            }
            for event in self._events
        ]

    def _gone(self, entry: Entry, trouble: str) -> None:
        if entry.phase == "draining":
            self.drained += 1
            self._note("drained", entry.replica_id)
            return
        self.lost += 1
        # The directory keeps one trouble; it may be about another replica.
        named = trouble.startswith((f"{entry.replica_id}:", f"{entry.replica_id} "))
        self._note("lost", entry.replica_id, trouble if named else "")

    def _note(self, kind: Kind, replica_id: str, text: str = "") -> None:
        self._numbers += 1
        self._events.append(Event(self._numbers, self._clock.now_s(), kind, replica_id, text))
