"""A sweep in several runs: what was taken is kept in a file, and the next run goes on from there.

A cell is one question to one server. Servers take turns within a round as before; a run that ends
inside a round leaves the rest of it to the next one.
"""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.cpu.ops import LIBRARY
from tests.peers.sweeps import Context, Point, Taken
from tests.prove import environments


class Kept:
    """A sweeps.Keeper: saves `taken` at `file` after every cell; late after that many seconds."""

    def __init__(self, taken: Taken, file: Path | None, seconds: float) -> None:
        self._taken, self._file = taken, file
        self._until_s = time.monotonic() + seconds

    def late(self) -> bool:
        return time.monotonic() > self._until_s

    def save(self) -> None:
        if self._file is None:
            return
        made = {"made_of": made_of(), **asdict(self._taken), "done": sorted(self._taken.done)}
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(made, indent=1))
        part.replace(self._file)


def load(file: Path | None) -> Taken:
    """What earlier runs took; nothing where there is no file. RuntimeError for one of other
    programs: figures of two of them would stand in one table."""
    if file is None or not file.exists():
        return Taken()
    kept = json.loads(file.read_text())
    if kept["made_of"] != made_of():
        raise RuntimeError(f"{file} is of other programs than these; delete it to begin anew")
    return Taken(
        streams=_loads(kept["streams"], lambda rate, firsts: Point(rate, tuple(firsts))),
        contexts=_loads(kept["contexts"], Context),
        seen=kept["seen"],
        failed=kept["failed"],
        done=set(kept["done"]),
    )


def _loads(kept: dict[str, dict[str, list[Any]]], make: Any) -> dict[int, dict[str, list[Any]]]:
    return {
        int(load): {name: [make(*each) for each in rounds] for name, rounds in servers.items()}
        for load, servers in kept.items()
    }


def made_of() -> str:
    """Of our kernels, and of the peers' versions."""
    library = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:16]
    return f"kernels {library}, {environments.LLAMA_CPP}, {environments.VLLM}"
