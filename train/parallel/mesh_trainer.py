"""A training step over a mesh: `train.step` where a replica is more than one rank."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from train.data.stream import SampleStream, share
from train.job import Job
from train.parallel.mesh_model import MeshLlama
from train.parallel.mesh_state import FullyShared, MeshState, Replicated
from train.parallel.tensor_exchange import total
from train.parallel.travel import Travel
from train.precision import COMPUTE
from train.schedule import factor
from train.step import StepReport, refuse_infinite
from train.world import World


class MeshTrainer:
    """One rank's part of a model, its optimizer and its place in the stream.

    full_shard: data ranks share the replica's state; without it theirs is equal.
    """

    def __init__(
        self, job: Job, model: MeshLlama, stream: SampleStream, *, full_shard: bool = False
    ) -> None:
        self.job, self.model, self.stream = job, model, stream
        kind = FullyShared if full_shard and model.mesh.data.size > 1 else Replicated
        self.state: MeshState = kind(model, COMPUTE[job.precision.compute], job.optimizer)
        self.step_number = self.samples = 0
        self.travel = Travel(job, model)
        self.before_update: Callable[[], None] = lambda: None
        """Called in each step before the first change of the state."""

    def step(self, world: World, stop: bool = False) -> StepReport:
        """One optimizer step of all ranks of the world. stop: this one asks for an end."""
        mesh = self.model.mesh
        mine = share(self.samples, self.job.batch_samples, mesh.data.rank, mesh.data.size)
        self.state.clear()
        told = torch.tensor([0.0, float(stop), 0.0], dtype=torch.float64)
        self.travel.begin()
        for tokens, weight in self._portions(mine.first, mine.samples):
            loss = self.model.loss(tokens) * (weight / self.job.run.batch_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            told[0] += float(loss.detach())
        told[0] /= mesh.tensor.size  # whose ranks have the same
        told[2] = self.travel.passed_s()
        world.all_reduce(told)
        self.travel.end(float(told[2]))
        self.state.reduce()
        norm = self._clip()
        refuse_infinite(norm, self.step_number + 1, self.job)
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.before_update()
        self.state.update(self.step_number + 1, rate)
        self.step_number += 1
        self.samples += self.job.batch_samples
        ids = self.stream.ids(mine.first, mine.samples)
        loss_nats, asked = float(told[0]), bool(told[1])
        return StepReport(self.step_number, self.samples, loss_nats, norm, rate, asked, ids)

    @property
    def together(self) -> bool:
        """Whether replicas need each other in each pass, as they share weights or experts."""
        return self.state.shared or self.model.mesh.expert.size > 1

    def _portions(self, first: int, samples: int) -> Iterator[tuple[Tensor, float]]:
        """A replica's micro-batches with weight 1. Where replicas are `together`, all of them make
        equally many passes: who has fewer samples goes through one with weight 0."""
        data, micro = self.model.mesh.data.size, self.job.micro_samples
        most = -(-self.job.batch_samples // data) if self.together else samples
        for start in range(first, first + most, micro):
            count = min(micro, first + samples - start)
            if count > 0:
                yield self.stream.batch(start, count), 1.0
            else:
                yield self.stream.batch(first, 1), 0.0

    def _clip(self) -> float:
        """Scales the gradient down to the job's limit; the whole model's norm before."""
        split, everywhere = torch.split(self.state.squares(), 1)
        norm = float((total(split.clone(), self.model.mesh.tensor) + everywhere).sqrt())
        limit = self.job.optimizer.clip_norm
        if limit and norm > limit:
            self.state.scale(limit / (norm + 1e-6))
        return norm
