"""Where a run's state survives its processes, as the run sees it."""

from pathlib import Path
from typing import Protocol

from train.checkpoint.states import StoredCheckpoints
from train.checkpoint.storage import open_storage
from train.job import Job
from train.state import TrainState
from train.world import World


class Checkpoints(Protocol):
    """States of one run by step. `save` is called by all workers of a world, `newest` by each."""

    def save(self, state: TrainState, world: World) -> None:
        """Keeps a copy of the state; when it returns on rank 0, the state is durable."""
        ...

    def newest(self) -> TrainState | None:
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
