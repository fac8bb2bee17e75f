"""A learner whose training state is shared out among a fixed set of workers by ZeRO
(`sharding.stage`; train/parallel/zero.py)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint, read_checked
from train.data.stream import SampleStream, share
from train.job import Job
from train.model import Llama
from train.optimizer import Decay
from train.parallel.zero import Sharded, shard
from train.precision import COMPUTE
from train.schedule import factor
from train.step import StepReport, refuse_infinite
from train.world import World


class ShardedTrainer:
    """A `train.learner.Learner` of stage 1, 2 or 3."""

    def __init__(self, job: Job, model: Llama, stream: SampleStream) -> None:
        self.job, self.model, self.stream = job, model, stream
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.parameters = sum(p.numel() for p in model.parameters())
        self.step_number = self.samples = 0
        self.before_update: Callable[[], None] = lambda: None
        self._sharded: Sharded | None = None

    @property
    def sharded(self) -> Sharded:
        """The state, once the worker has its place."""
        assert self._sharded is not None, "enter comes first"
        return self._sharded

    def enter(self, world: World) -> None:
        """See `Learner`. ValueError as `shard` has it."""
        table, compute = self.job.optimizer, self.job.precision.compute
        decay = Decay(table.beta1, table.beta2, table.epsilon, table.weight_decay)
        self._sharded = shard(self.model, world, self.job.sharding.stage, compute, decay)

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        mine = share(self.samples, self.job.batch_samples, world.rank, world.size)
        self.sharded.clear_gradient()
        told = torch.tensor([0.0, float(stop)], dtype=torch.float64)
        for tokens, weight in self._portions(mine.first, mine.samples, world.size):
            loss = self.model.loss(tokens) * (weight / self.job.run.batch_tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            told[0] += float(loss.detach())
        self.sharded.reduce()
        world.all_reduce(told)
        norm = self.sharded.clip(self.job.optimizer.clip_norm)
        refuse_infinite(norm, self.step_number + 1, self.job)
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.before_update()
        self.sharded.update(self.step_number + 1, rate)
        self.step_number += 1
        self.samples += self.job.batch_samples
        ids = self.stream.ids(mine.first, mine.samples)
        loss_nats, asked = float(told[0]), bool(told[1])
        return StepReport(self.step_number, self.samples, loss_nats, norm, rate, asked, ids)

    def _portions(self, first: int, samples: int, size: int) -> Iterator[tuple[Tensor, float]]:
        """A worker's micro-batches with weight 1. Every worker makes equally many passes, for each
        sends and receives: who has fewer samples goes through one with weight 0."""
        most = -(-self.job.batch_samples // size)
        end = first + samples
        for start in range(first, first + most, self.job.micro_samples):
            count = min(self.job.micro_samples, end - start)
            if count > 0:
                yield self.stream.batch(start, count), 1.0
            else:
                yield self.stream.batch(first, 1), 0.0

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`."""
        return self.sharded.pieces()

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        for name, shape in self.shapes.items():
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                there = f"{kind}/{name}"
                if there not in found.names or found.shape(there) != shape:
                    read_checked(found, there, shape)  # says what is amiss
        self.sharded.load(found)
        self.step_number, self.samples = found.step, found.meta["samples"]

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`. Equally many passes on all workers here, too."""
        mine = share(0, len(rows), world.rank, world.size)
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for turn in range(-(-len(rows) // world.size)):
                own = turn < mine.samples
                nats = float(self.model.loss(rows[mine.first + turn if own else 0]))
                total += nats if own else 0.0
        world.all_reduce(total)
        return float(total)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        compute = COMPUTE[self.job.precision.compute]
        found = {}
        for name, parameter in self.model.named_parameters():
            held = parameter.detach()
            whole = held.full_tensor() if isinstance(held, DTensor) else held
            found[name] = whole.to(compute)
        return found
