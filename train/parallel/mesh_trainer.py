"""A training step over a mesh: `train.step` where a replica is more than one rank."""

import torch

from train.data.stream import SampleStream, share
from train.job import Job
from train.parallel.mesh_model import MeshLlama
from train.parallel.mesh_state import FullyShared, MeshState, Replicated
from train.parallel.tensor_exchange import total
from train.precision import COMPUTE
from train.schedule import factor


class MeshTrainer:
    """One rank's part of a model, its optimizer and its place in the stream.

    stage: 0, data ranks have equal state; 3, they share it. ValueError for another, or for a batch
    that data ranks cannot share evenly in stage 3, where each has to make as many passes.
    """

    def __init__(self, job: Job, model: MeshLlama, stream: SampleStream, *, stage: int = 0) -> None:
        self.job, self.model, self.stream = job, model, stream
        if stage not in (0, 3):
            raise ValueError(f"sharding.stage = {stage} over a mesh: accepted are 0 and 3")
        data = model.mesh.data.size
        if stage == 3 and job.batch_samples % (data * job.micro_samples):
            raise ValueError(
                f"sharding.stage = 3: a batch of {job.batch_samples} samples is not divisible by "
                f"mesh.data x micro-batch = {data} x {job.micro_samples}"
            )
        kind = FullyShared if stage == 3 and data > 1 else Replicated
        self.state: MeshState = kind(model, COMPUTE[job.precision.compute], job.optimizer)
        self.step_number = self.samples = 0

    def step(self) -> tuple[float, float]:
        """One optimizer step of all ranks: nats per token before it, and the gradient's norm."""
        mesh = self.model.mesh
        mine = share(self.samples, self.job.batch_samples, mesh.data.rank, mesh.data.size)
        self.state.clear()
        nats = torch.zeros(1, dtype=torch.float64)
        for first in range(mine.first, mine.first + mine.samples, self.job.micro_samples):
            count = min(self.job.micro_samples, mine.first + mine.samples - first)
            loss = self.model.loss(self.stream.batch(first, count)) / self.job.run.batch_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            nats += loss.detach()
        total(total(nats, mesh.data), mesh.sequence)
        self.state.reduce()
        norm = self._clip()
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.state.update(self.step_number + 1, rate)
        self.step_number += 1
        self.samples += self.job.batch_samples
        return float(nats), norm

    def _clip(self) -> float:
        """Scales the gradient down to the job's limit; the whole model's norm before."""
        split, everywhere = torch.split(self.state.squares(), 1)
        norm = float((total(split.clone(), self.model.mesh.tensor) + everywhere).sqrt())
        limit = self.job.optimizer.clip_norm
        if limit and norm > limit:
            self.state.scale(limit / (norm + 1e-6))
        return norm
