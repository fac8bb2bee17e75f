"""A trainer of `train.memory` as a run's learner."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.checkpoint.states import read_state, state_pieces
from train.learner import shared_nats
from train.memory.trainers import RunTrainer
from train.step import StepReport
from train.world import World


class InLessMemory:
    """A `train.learner.Learner` that holds all of the state, in part elsewhere or in few bits."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.before_update: Callable[[], None] = lambda: None

    @property
    def step_number(self) -> int:
        """See `Learner`."""
        return self.trainer.step_number

    @property
    def samples(self) -> int:
        """See `Learner`."""
        return self.trainer.samples

    @property
    def parameters(self) -> int:
        """See `Learner`."""
        return sum(math.prod(slot.shape) for slot in self.trainer.flat.slots)

    def enter(self, world: World) -> None:
        """Nothing is to be divided."""

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        self.before_update()  # nothing is copied while weights and moments are on their way
        return self.trainer.step(world, stop)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`."""
        return state_pieces(self.trainer.state(), world)

    def notes(self) -> dict[str, Any]:
        """See `Learner`: ranges and bits of what activations are kept in."""
        return self.trainer.state().meta

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        self.trainer.load(read_state(found))

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        return shared_nats(self.trainer.model.loss, rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.trainer.flat.named(self.trainer.flat.weights)
