"""What elastic training asks of a job: steps to abandon, state to hand on.

`train.step.Trainer` is a Trainee: every worker holds all of the state. A ShardedTrainee holds one
share of it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from train.state import TrainState
from train.world import World


class StepEnd(Protocol):
    """A finished step: its number from 1, samples consumed after it, the loss of the global batch
    (the same on every rank), whether any rank asked to stop, and this rank's sample ids."""

    @property
    def step(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def stop(self) -> bool: ...
    @property
    def ids(self) -> list[int]: ...


class Trainee(Protocol):
    """One worker's part of a job, the same at any world size.

    A step that raises `WorldChanged` has changed nothing: no collective follows the first change.
    Two fresh trainees of one job are equal.
    """

    def state(self) -> TrainState:
        """All of it, tensors live."""
        ...

    def load(self, state: TrainState) -> None:
        """Goes on from a state, whose values are copied."""
        ...

    def step(self, world: World, stop: bool = False) -> StepEnd:
        """One step of the constant global batch. stop: this worker asks for a pause after it."""
        ...


@dataclass(frozen=True)
class Flat:
    """A vector of the whole state that workers share out by `train.data.stream.share`."""

    length: int
    dtype: torch.dtype


class ShardedTrainee(Protocol):
    """One worker's part of a job whose state is shared out. A step may tear it: whoever abandons
    one has to `load_shard` a whole version."""

    def flats(self) -> dict[str, Flat]:
        """Every shared vector, by name."""
        ...

    def shard(self) -> TrainState:
        """This rank's share of each vector, live."""
        ...

    def load_shard(self, world: World, state: TrainState | None) -> None:
        """Goes on with the share of `world.rank` of `world.size`, which is copied; gathers from the
        others what else it needs. None: as a fresh job starts."""
        ...

    def step(self, world: World, stop: bool = False) -> StepEnd:
        """As a Trainee's."""
        ...
