"""The market's books on disk: machines by token, and what happened, so that nothing is forgotten
with the process that rented."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from autoscale.providers.provider import Machine
from autoscale.spot.events import SpotEvent

_MACHINE = TypeAdapter(Machine)
_EVENT = TypeAdapter(SpotEvent)


def id_of(token: str) -> str:
    """The id of the machine that answers to a token: the same for the same token, always."""
    return "m-" + hashlib.sha256(token.encode()).hexdigest()[:12]


@dataclass
class Ledger:
    """One file for each machine, one line for each event, and when the market opened.

    What is read at the start is kept in memory; every change is on disk before it is acted on.
    """

    folder: Path

    def __post_init__(self) -> None:
        self._machines.mkdir(parents=True, exist_ok=True)
        files = sorted(self._machines.glob("*.json"))
        read = [_MACHINE.validate_json(file.read_bytes()) for file in files]
        self.machines = {machine.id: machine for machine in sorted(read, key=_order)}
        self.events: list[SpotEvent] = []
        if self._events.exists():
            # A line that a crash cut short was not told to anybody.
            whole = self._events.read_bytes().rpartition(b"\n")[0]
            self.events = [_EVENT.validate_json(line) for line in whole.splitlines()]
            self._events.write_bytes(b"".join(_EVENT.dump_json(e) + b"\n" for e in self.events))

    def opened_s(self, now_s: float) -> float:
        """When the market opened: now, for the first who asks."""
        file = self.folder / "opened"
        if not file.exists():
            _write(file, repr(now_s).encode())
        return float(file.read_text())

    def keep(self, machine: Machine) -> None:
        """Note a machine as it is now."""
        _write(self._machines / f"{machine.id}.json", _MACHINE.dump_json(machine))
        self.machines[machine.id] = machine

    def started(self, machine_id: str) -> None:
        """Note that a machine's process was begun."""
        _write(self._machines / f"{machine_id}.started", b"")

    def never_started(self, machine_id: str) -> bool:
        """Whether a crash came between noting a launch and beginning it."""
        return not (self._machines / f"{machine_id}.started").exists()

    def change(self, machine_id: str, **fields: object) -> Machine:
        """Note what changed of a machine; returns it."""
        machine = replace(self.machines[machine_id], **fields)  # type: ignore[arg-type]
        self.keep(machine)
        return machine

    def forget(self, machine_id: str) -> None:
        """A launch that came to nothing."""
        (self._machines / f"{machine_id}.json").unlink(missing_ok=True)
        self.machines.pop(machine_id, None)

    def tell(self, event: SpotEvent) -> None:
        """Append an event; its place is its cursor."""
        with self._events.open("ab") as file:
            file.write(_EVENT.dump_json(event) + b"\n")
        self.events.append(event)

    @property
    def _machines(self) -> Path:
        return self.folder / "machines"

    @property
    def _events(self) -> Path:
        return self.folder / "events.jsonl"


def _order(machine: Machine) -> tuple[float, str]:
    return machine.launched_s, machine.id


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, whenever the writer dies."""
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)
