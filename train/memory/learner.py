"""A trainer of `train.memory` as a run's learner."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.checkpoint.states import read_state, state_pieces
from train.learner import shared_nats
from train.memory.trainers import Built
from train.state import TrainState
from train.step import StepReport
from train.world import World

CODEC = "codec"
"""Where a checkpoint's meta has the codec's state (ranges, bits): rank 0's, with several."""


class InLessMemory:
    """A `train.learner.Learner` that holds all of the state, in part elsewhere or in few bits."""

    def __init__(self, built: Built) -> None:
        self.trainer, self._coded = built

    @property
    def before_update(self) -> Callable[[], None]:
        """See `Learner`."""
        return self.trainer.before_update

    @before_update.setter
    def before_update(self, call: Callable[[], None]) -> None:
        self.trainer.before_update = call

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
        return self.trainer.step(world, stop)

    def state(self) -> TrainState:
        """All of it, tensors live."""
        return replace(self.trainer.state(), meta=self.notes())

    def load(self, state: TrainState) -> None:
        """Goes on from a state. One of another codec, or of none, leaves this one fresh."""
        self.trainer.load(state)
        if self._coded is None:
            return
        kept = state.meta.get(CODEC, {}).get(type(self._coded.codec).__name__)
        if kept is not None:
            self._coded.codec.load(kept)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`."""
        return state_pieces(self.trainer.state(), world)

    def notes(self) -> dict[str, Any]:
        """See `Learner`: ranges and bits of what activations are kept in."""
        if self._coded is None:
            return {}
        return {CODEC: {type(self._coded.codec).__name__: self._coded.codec.state()}}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        self.load(read_state(found))

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        return shared_nats(self.trainer.model.loss, rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.trainer.flat.named(self.trainer.flat.weights)
