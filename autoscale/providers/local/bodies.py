"""What a local machine is made of: one process and all that descends from it.

A machine's processes carry its name in their environment, so that whoever comes after a crash finds
all of them, and none is left when it is ended.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil

from autoscale.catalog.offer import Offer

MARK_VARIABLE = "_SANDERLING_MACHINE"
END_S = 10.0  # for killed processes to be gone


class Start(NamedTuple):
    """A machine's command, and variables beside those of this process."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}


class Bodies(Protocol):
    """Starts and ends machines; finds those that somebody else started."""

    def start(self, machine_id: str, offer: Offer) -> None:
        """Begin to start a machine; returns at once. OSError where it can't be begun."""
        ...

    def kill(self, machine_id: str) -> None:
        """SIGKILL to all of a machine; returns when it is gone. Idempotent."""
        ...

    def alive(self) -> frozenset[str]:
        """Machines whose first process lives, whoever started it."""
        ...

    def up(self, machine_id: str) -> bool:
        """Whether a living machine can be used by now."""
        ...


@dataclass
class ProcessBodies:
    """See Bodies. folder: where what machines say is kept, and their name's first part; one folder
    is one market's. describe: the command that is a machine. answers: whether a started machine can
    be used; by default as soon as it lives."""

    folder: Path
    describe: Callable[[str, Offer], Start]
    answers: Callable[[str], bool] = lambda _: True
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _adopted: dict[str, psutil.Process] | None = None

    def start(self, machine_id: str, offer: Offer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.describe(machine_id, offer)
        environment = {**os.environ, **start.environment, MARK_VARIABLE: self._mark(machine_id)}
        with (self.folder / f"{machine_id}.log").open("ab") as log:
            self._children[machine_id] = subprocess.Popen(
                list(start.command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the caller's terminal is not a machine's end
            )

    def kill(self, machine_id: str) -> None:
        end_s = time.monotonic() + END_S
        while found := [p for name, p in self._processes() if name == machine_id]:
            for process in found:
                _kill(process)
            self._lives(machine_id)
            if time.monotonic() > end_s:
                raise TimeoutError(f"{machine_id}: {found} survived SIGKILL for {END_S:g} s")
            time.sleep(0.002)
        self._children.pop(machine_id, None)
        if self._adopted:
            self._adopted.pop(machine_id, None)

    def alive(self) -> frozenset[str]:
        """Looks for others' machines once; those of ours are asked after, which costs nothing."""
        if self._adopted is None:
            self._adopted = {name: p for name, p in self._processes() if name not in self._children}
        return frozenset(name for name in [*self._children, *self._adopted] if self._lives(name))

    def up(self, machine_id: str) -> bool:
        return self.answers(machine_id)

    def _lives(self, machine_id: str) -> bool:
        """Whether a machine's first process lives. A child of ours that ended is reaped by it."""
        child = self._children.get(machine_id)
        if child is not None:
            return child.poll() is None
        process = (self._adopted or {}).get(machine_id)
        return process is not None and _mark_of(process) != ""

    def _processes(self) -> list[tuple[str, psutil.Process]]:
        prefix = self._mark("")
        return [
            (mark.removeprefix(prefix), process)
            for process in psutil.process_iter()
            if (mark := _mark_of(process)).startswith(prefix)
        ]

    def _mark(self, machine_id: str) -> str:
        return f"{self.folder.resolve()}/{machine_id}"


def _mark_of(process: psutil.Process) -> str:
    """What a living process is marked with, "" for none of ours."""
    try:
        mark = process.environ().get(MARK_VARIABLE, "")
        return mark if mark and process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
