"""Where a run's state survives its processes, as the run sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.checkpoint.states import StoredCheckpoints
from train.checkpoint.storage import open_storage
from train.checkpoint.writer import CheckpointWriter
from train.job import Job
from train.world import World


class Checkpoints(Protocol):
    """States of one run by step. `write` and `writer` are called by all workers of a world."""

    def write(self, step: int, meta: dict[str, Any], pieces: Sequence[Piece], world: World) -> None:
        """Keeps a copy of every worker's pieces; when it returns, all of it is durable. meta:
        {"samples": consumed so far, "meta": JSON values}."""
        ...

    def writer(self, world: World) -> CheckpointWriter:
        """For writing beside training."""
        ...

    def find(self) -> Checkpoint | None:
        """The newest whole one, or None."""
        ...

    def clear(self) -> None:
        """Forgets all."""
        ...


def open_checkpoints(job: Job, folder: Path) -> Checkpoints:
    """The job's checkpoints: where it says, or in the run's folder. ValueError for a place that is
    none."""
    place = job.resilience.checkpoints
    where = f"{place.rstrip('/')}/{job.name}" if place else str(folder)
    return StoredCheckpoints(open_storage(where), job.resilience.keep)
