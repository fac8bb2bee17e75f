"""What a run asks of whoever makes its steps, and the one that holds the whole state: `Whole`.

Others hold a part of it: `train.sharded` (ZeRO), `train.parallel.pipeline_job` (layers),
`train.parallel.mesh_job` (parts of matrices and sequences).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint, read_checked
from train.checkpoint.states import of_ranks, state_pieces
from train.data.stream import SampleStream
from train.data.stream import share as share_out
from train.folder import RunFolder
from train.heterogeneous.shares import Measured
from train.job import Job
from train.state import TrainState
from train.step import StepReport, Trainer
from train.weights import Start, build_model
from train.world import World


class Learner(Protocol):
    """One worker's part of a job. All workers of a world call its methods together."""

    before_update: Callable[[], None]
    """Called in each step before the first change of the state."""

    @property
    def step_number(self) -> int:
        """Finished steps."""
        ...

    @property
    def samples(self) -> int:
        """Consumed so far."""
        ...

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        ...

    def enter(self, world: World) -> None:
        """Takes its place among the workers, with the first weights; before anything else."""
        ...

    def step(self, world: World, stop: bool = False) -> StepReport:
        """One optimizer step. stop: this worker asks for an end after it."""
        ...

    def pieces(self, world: World) -> list[Piece]:
        """What this worker writes of a checkpoint; live."""
        ...

    def notes(self) -> dict[str, Any]:
        """What else a checkpoint keeps of it, rank 0's: JSON values, in its meta."""
        ...

    def restore(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint, whoever wrote it. ValueError when it is of another model."""
        ...

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """What rows of tokens, (1, tokens + 1) each and all equally long, cost under the weights;
        summed over all workers, the same on each."""
        ...

    def exported(self, world: World) -> dict[str, Tensor]:
        """All weights by name, as computed with, on rank 0; whatever is there on others."""
        ...


def build_learner(job: Job, start: Start, stream: SampleStream, folder: RunFolder) -> Learner:
    """The one that the job's settings name; folder: where offloaded state may lie."""
    if not job.memory.plain:
        from train.memory.learner import InLessMemory
        from train.memory.trainers import build_trainer

        return InLessMemory(build_trainer(job, folder, start, stream))
    if job.meshed:
        from train.parallel.mesh_job import MeshLearner

        return MeshLearner(job, start, stream)
    if job.pipeline.stages and job.workers.staleness is not None:
        from train.heterogeneous.hetpipe_pipeline import ChainLearner

        return ChainLearner(job, start, stream)
    if job.pipeline.stages:
        from train.parallel.pipeline_job import PipelineLearner

        return PipelineLearner(job, start, stream)
    model = build_model(job, start)
    if job.workers.staleness is not None:
        from train.heterogeneous.hetpipe_job import HetPipeLearner

        return HetPipeLearner(job, model, stream)
    if not job.sharding.stage:
        if job.workers.shares == "measured":
            return Whole(job, model, stream, Measured(unit=job.micro_samples))
        return Whole(job, model, stream)
    if job.resilience.mode == "gemini":
        from train.elastic.shares import SharedOut

        return SharedOut(job, model, stream)
    from train.sharded import ShardedTrainer

    return ShardedTrainer(job, model, stream)


class Whole(Trainer):
    """A learner that holds all of the state, as every other worker does."""

    @property
    def parameters(self) -> int:
        """See `Learner`."""
        return self.flat.masters.numel()

    def enter(self, world: World) -> None:
        """Nothing is to be divided."""

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: an equal share of every tensor, and what only this worker has."""
        return state_pieces(self.state(), world)

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        tensors = {
            name: read_checked(found, name, tuple(tensor.shape))
            for name, tensor in self.state().tensors.items()
        }
        ranks = of_ranks(found)
        self.load(TrainState(found.step, found.meta["samples"], tensors, ranks=ranks))

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        return shared_nats(self.model.loss, rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        return self.flat.named(self.flat.weights)


def shared_nats(loss: Callable[[Tensor], Tensor], rows: Sequence[Tensor], world: World) -> float:
    """The sum of a model's losses over rows, shared out among workers that all have the model."""
    mine = share_out(0, len(rows), world.rank, world.size)
    total = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for row in rows[mine.first : mine.first + mine.samples]:
            total += float(loss(row))
    world.all_reduce(total)
    return float(total)
