"""A learner that holds a part of each matrix, computes a part of each sequence, or shares its state
with replicas by FSDP: a worker of a job with `[mesh]`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.combine_mesh import uneven
from train.data.stream import SampleStream, share
from train.job import Job
from train.parallel.mesh import Mesh, build_mesh
from train.parallel.mesh_model import ExpertTable, MeshLlama
from train.parallel.mesh_pieces import load_pieces, mesh_pieces
from train.parallel.mesh_state import whole_parameters
from train.parallel.mesh_trainer import MeshTrainer
from train.precision import COMPUTE
from train.step import StepReport
from train.weights import Start, first_values
from train.world import World


class MeshLearner:
    """A `train.learner.Learner` over a mesh. May `enter` again: with the first weights."""

    def __init__(self, job: Job, start: Start, stream: SampleStream) -> None:
        """ValueError when workers cannot share the model evenly."""
        config = start.config
        for sentence in uneven(job, config.heads, config.kv_heads, config.ff):
            raise ValueError(sentence)
        self.job, self.start, self.stream = job, start, stream
        self.shapes = whole_shapes(job, config)
        self.parameters = sum(map(math.prod, self.shapes.values()))
        self.before_update: Callable[[], None] = lambda: None
        self._trainer: MeshTrainer | None = None

    @property
    def trainer(self) -> MeshTrainer:
        """The part, once the worker has its place."""
        assert self._trainer is not None, "enter comes first"
        return self._trainer

    @property
    def step_number(self) -> int:
        """Finished steps."""
        return self._trainer.step_number if self._trainer else 0

    @property
    def samples(self) -> int:
        """Consumed so far."""
        return self._trainer.samples if self._trainer else 0

    def enter(self, world: World) -> None:
        """See `Learner`. ValueError where so many workers make no mesh."""
        table = self.job.mesh
        mesh = build_mesh(
            world.size, sequence=table.sequence, tensor=table.tensor, expert=table.expert
        )
        model = self._model(mesh)
        self._trainer = MeshTrainer(self.job, model, self.stream, full_shard=table.full_shard)
        self._trainer.before_update = lambda: self.before_update()

    def _model(self, mesh: Mesh) -> MeshLlama:
        """This worker's part with the first weights; of the whole model one parameter at a time."""
        table = self.job.mesh
        with torch.device("meta"):
            model = MeshLlama(
                self.start.config,
                mesh,
                self.job.data.sequence_tokens,
                sequence_parallel=table.sequence_parallel,
                ring=table.sequence_kind == "ring",
                experts=experts_of(self.job),
            )
        model.to_empty(device="cpu")
        model.tie()
        if self.job.precision.compute == "float64":
            model.double()
        first = first_values(self.job, self.start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                whole = torch.empty(self.shapes[name], dtype=parameter.dtype)
                first(name, whole)
                parameter.copy_(model.part(name, whole))
        return model

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        return self.trainer.step(world, stop)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: some rows of what it holds; collective here."""
        compute = COMPUTE[self.job.precision.compute]
        return mesh_pieces(self.trainer.state, self.trainer.model, self.shapes, compute)

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        trainer = self.trainer
        load_pieces(trainer.state, trainer.model, self.shapes, found)
        trainer.step_number, trainer.samples = found.step, found.meta["samples"]

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`: shared out among replicas; equally many passes if they share weights
        or experts."""
        model, together = self.trainer.model, self.trainer.together
        data, tensor = model.mesh.data, model.mesh.tensor
        mine = share(0, len(rows), data.rank, data.size)
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for turn in range(-(-len(rows) // data.size)):
                own = turn < mine.samples
                if own or together:
                    nats = float(model.loss(rows[mine.first + turn if own else 0], balanced=False))
                    total += nats if own else 0.0
        total /= tensor.size  # whose ranks have the same
        world.all_reduce(total)
        return float(total)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`: put together one parameter after another."""
        compute, trainer = COMPUTE[self.job.precision.compute], self.trainer
        found = {}
        for name, parameter in whole_parameters(trainer.state, trainer.model):
            if world.rank == 0:
                found[name] = parameter.to(compute)
        return found


def experts_of(job: Job) -> ExpertTable | None:
    """The mixture that a job asks for."""
    table = job.model
    if not table.experts:
        return None
    return ExpertTable(table.experts, table.experts_per_token, table.balance)


def whole_shapes(job: Job, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of the whole model's parameters, by name."""
    with torch.device("meta"):
        model = MeshLlama(config, Mesh(), job.data.sequence_tokens, experts=experts_of(job))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
