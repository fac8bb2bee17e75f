"""A training step over a mesh: `train.step` where a replica is more than one rank.

Gradients of a replica's own parts are summed over data and sequence ranks; those of norms, which
every tensor rank has whole, over tensor ranks, too, where each has seen a part of the tokens only.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.stream import SampleStream, share
from train.job import Job
from train.layout import FlatModel
from train.optimizer import build_optimizer
from train.parallel.mesh_model import ROW, MeshLlama
from train.parallel.tensor_exchange import total
from train.precision import COMPUTE
from train.schedule import factor


class MeshTrainer:
    """One rank's part of a model, its optimizer and its place in the stream."""

    def __init__(self, job: Job, model: MeshLlama, stream: SampleStream) -> None:
        self.job, self.model, self.stream = job, model, stream
        self.flat = FlatModel(model, COMPUTE[job.precision.compute])
        self.optimizer = build_optimizer(self.flat, job.optimizer)
        self.step_number = self.samples = 0

    def step(self) -> tuple[float, float]:
        """One optimizer step of all ranks: nats per token before it, and the gradient's norm."""
        data = self.model.mesh.data
        mine = share(self.samples, self.job.batch_samples, data.rank, data.size)
        flat, tokens = self.flat, self.job.run.batch_tokens
        flat.clear_gradient()
        for first in range(mine.first, mine.first + mine.samples, self.job.micro_samples):
            count = min(self.job.micro_samples, mine.first + mine.samples - first)
            loss = self.model.loss(self.stream.batch(first, count)) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            flat.summed[-2] += loss.detach()
        for axis in (data, self.model.mesh.sequence):
            total(flat.summed, axis)
        self._sum_norms()
        norm = self._clip()
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.optimizer.update(self.step_number + 1, rate)
        flat.publish()
        self.step_number += 1
        self.samples += self.job.batch_samples
        return float(flat.summed[-2]), norm

    def whole(self) -> dict[str, Tensor]:
        """The whole model's masters by name, on every rank; called by all."""
        axis, parts = self.model.mesh.tensor, self.flat.named(self.flat.masters)
        everywhere = set(self.model.whole_everywhere)
        wholes = {}
        for name, part in parts.items():
            if axis.group is None or name in everywhere:
                wholes[name] = part.clone()
                continue
            shapes: list[tuple[int, ...]] = [()] * axis.size
            dist.all_gather_object(shapes, tuple(part.shape), group=axis.group)
            found = [part.new_empty(shape) for shape in shapes]
            for rank, place in enumerate(found):
                if rank == axis.rank:
                    place.copy_(part)
                dist.broadcast(place, group=axis.group, group_src=rank)
            wholes[name] = torch.cat(found, 1 if name.endswith(ROW) else 0)
        return wholes

    def _sum_norms(self) -> None:
        """Over tensor ranks, where each has seen its own tokens between matrices."""
        axis = self.model.mesh.tensor
        if axis.group is None or not self.model.sequence_parallel:
            return
        named = self.flat.named(self.flat.gradient)
        norms = [named[name] for name in self.model.whole_everywhere]
        joined = total(torch.cat([norm.flatten() for norm in norms]), axis)
        for norm, summed in zip(
            norms, torch.split(joined, [n.numel() for n in norms]), strict=True
        ):
            norm.copy_(summed.view_as(norm))

    def _clip(self) -> float:
        """Scales the gradient down to the job's limit; the whole model's norm before."""
        named = self.flat.named(self.flat.gradient)
        everywhere = set(self.model.whole_everywhere)
        squares = torch.zeros(2, dtype=self.flat.gradient.dtype)
        for name, gradient in named.items():
            squares[int(name in everywhere)] += gradient.square().sum()
        squares[:1] = total(squares[:1].clone(), self.model.mesh.tensor)
        norm = float(squares.sum().sqrt())
        limit = self.job.optimizer.clip_norm
        if limit and norm > limit:
            self.flat.gradient.mul_(limit / (norm + 1e-6))
        return norm
