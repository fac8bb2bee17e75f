"""ZeRO (Rajbhandari et al., SC 2020): each of N workers keeps its share of the training state.

| stage | kept whole       | kept in shares              | bytes a parameter (bfloat16) | sent |
|-------|------------------|-----------------------------|------------------------------|------|
| 1     | weights, gradient| masters, moments            | 4 + 12 / N                   | 2    |
| 2     | weights          | gradient, masters, moments  | 2 + 14 / N                   | 2    |
| 3     | nothing          | all                         | 16 / N                       | 3    |

Sent: multiples of the weights' bytes, times (N - 1) / N, a step. Stages 1 and 2 are flat buckets of
our own (`zero_flat.py`), stage 3 is torch's FSDP2 (`zero_full.py`). Masters and updates are the
same on any number of workers, and so are the names and stretches that a checkpoint gets, so any
stage on any number of workers goes on from any other's.
"""

from typing import Protocol

from torch import nn

from train.checkpoint.piece import Piece
from train.optimizer import Decay
from train.parallel.zero_flat import FlatShards, Source
from train.parallel.zero_full import FullShards
from train.precision import COMPUTE
from train.world import World


class Sharded(Protocol):
    """A model whose training state is shared out. Used alike on every rank, in the same order.

    Every rank makes the same number of backward passes between two updates, for each sends and
    receives in stages 2 and 3; who has fewer samples makes one of weight nothing. Gradients are
    summed over ranks: the loss is divided by the whole batch's tokens beforehand.
    """

    def clear_gradient(self) -> None:
        """Before the first backward pass of a step."""
        ...

    def reduce(self) -> None:
        """After the last one: the gradient's share of this rank is then the sum over ranks."""
        ...

    def clip(self, limit: float) -> float:
        """Scales the reduced gradient down to `limit` (0: no limit); its norm before, over all."""
        ...

    def update(self, step: int, learning_rate: float) -> None:
        """AdamW, the step-th (from 1), and every rank's weights made new."""
        ...

    def pieces(self) -> list[Piece]:
        """What this rank keeps, for a checkpoint; views of live tensors."""
        ...

    def load(self, source: Source) -> None:
        """Goes on from a state written at any stage on any number of ranks. KeyError if a
        parameter is missing there."""
        ...


def shard(model: nn.Module, world: World, stage: int, compute: str, decay: Decay) -> Sharded:
    """Takes the model over; its values must be the same on all ranks.

    stage: 1, 2 or 3; compute: `precision.compute`, the dtype of weights and gradients. Matrices
    have weight decay, vectors none. Alone, stage 3 is stage 2: all is this rank's.
    ValueError for another stage, or a world of several that has
    no process group.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"sharding.stage = {stage}: accepted are 1, 2 and 3 (0 shares nothing)")
    if world.size > 1 and world.group is None:
        raise ValueError(
            f"sharding.stage = {stage} needs workers with a process group (gloo); these have none. "
            "sharding.stage = 0 needs none."
        )
    if stage == 3 and world.group is not None:
        return FullShards(model, world.group, COMPUTE[compute], decay)
    return FlatShards(model, world.group, min(stage, 2), COMPUTE[compute], decay)
