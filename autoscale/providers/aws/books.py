"""What happened, on disk, so that a cursor stands for the same events after a crash.

Times are those of the calendar, for a process's clock ends with it. Each entry has a key, and a key
is noted once: whatever is told twice or read again changes nothing.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from autoscale.spot.events import EventKind, SpotEvent

READY = "ready"


@dataclass
class Books:
    """events: in the order in which they were noted, with times that never go back. offset_s: what
    a calendar time lacks to be one of the caller's clock."""

    folder: Path
    offset_s: float
    events: list[SpotEvent] = field(default_factory=list)
    _times: dict[str, float] = field(default_factory=dict)
    _last_s: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            return
        # A line that a crash cut short was not told to anybody.
        whole = self._file.read_bytes().rpartition(b"\n")[0]
        for line in whole.splitlines():
            self._take(json.loads(line))
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(whole + b"\n" if whole else b"")
        os.replace(fresh, self._file)

    def tell(self, key: str, at_s: float, pool: str, kind: EventKind, value: float) -> None:
        """Note an event of a calendar time, unless its key is known."""
        if key not in self._times:
            at_s = max(round(at_s, 3), self._last_s)
            self._note({"key": key, "at_s": at_s, "pool": pool, "kind": kind, "value": value})

    def knows(self, key: str) -> bool:
        return key in self._times

    def first_s(self, key: str, at_s: float) -> float:
        """When this key was first noted: now, for the first who asks."""
        if key not in self._times:
            self._note({"key": key, "at_s": round(at_s, 3), "kind": READY})
        return self._times[key]

    def _note(self, entry: dict[str, Any]) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        self._times[entry["key"]] = entry["at_s"]
        if entry["kind"] in get_args(EventKind):
            self._last_s = max(self._last_s, entry["at_s"])
            at_s = entry["at_s"] + self.offset_s
            self.events.append(SpotEvent(at_s, entry["pool"], entry["kind"], entry["value"]))

    @property
    def _file(self) -> Path:
        return self.folder / "events.jsonl"
