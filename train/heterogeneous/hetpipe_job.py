"""A learner whose workers do not wait for each other at every step (`workers.staleness = D`):
HetPipe (Park et al., ATC 2020) with virtual workers of one process each.

A step is a wave: the worker's share of the step's samples, computed with the version it has, pushed
to the servers; then the newest version, which lacks at most D waves that it has pushed itself. Each
process is also the server of an equal share of masters and moments. Checkpoints, evaluations and
the end are made of exact versions: all workers come to them after the same step, and the servers
wait until all have pushed it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.communication.transport import dense_bytes
from train.data.stream import SampleStream, Share
from train.data.stream import share as share_out
from train.heterogeneous.hetpipe_member import Member
from train.heterogeneous.shares import shares
from train.job import Job
from train.layout import FlatModel
from train.learner import shared_nats
from train.model import Llama
from train.precision import COMPUTE
from train.schedule import factor
from train.step import StepReport, refuse_infinite
from train.world import World

KEEP = 0.5
"""What an old measurement of a worker's speed counts."""


class HetPipeLearner:
    """A `train.learner.Learner`. Of a report, loss and norm are known late: loss is that of the
    wave D before (of the worker's own share where there was none), the norm that of its own
    gradient. A wish to stop is heard by all after the same step, D after the one it came with."""

    def __init__(
        self,
        job: Job,
        model: Llama,
        stream: SampleStream,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.job, self.model, self.stream, self._clock = job, model, stream, clock
        self.flat = FlatModel(model, COMPUTE[job.precision.compute])
        self.parameters = self.flat.masters.numel()
        self.member = Member(job, self.flat, self.rate)
        self.step_number = self.samples = 0
        self.before_update: Callable[[], None] = lambda: None
        self._per_s = 0.0
        self._begun = False

    def enter(self, world: World) -> None:
        """See `Learner`: opens this process' server, and finds the others'."""
        self.member.enter(world, range(world.size))

    def rate(self, finished: int) -> float:
        """The learning rate after so many steps."""
        return self.job.optimizer.learning_rate * factor(
            self.job.schedule, finished, self.job.steps
        )

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        if not self._begun:  # nobody pushes to a server that still reads its checkpoint
            world.barrier()
            self._begun = True
        mine, member = self._mine(world), self.member
        sent_before = member.moved_bytes
        begun_s = self._clock()
        loss = self._gradient(mine)
        norm = float(torch.linalg.vector_norm(self.flat.gradient))
        refuse_infinite(norm, self.step_number + 1, self.job)
        self._measured(mine.samples, self._clock() - begun_s)
        self.before_update()
        facts = torch.tensor([loss, self._per_s, float(stop)], dtype=torch.float64)
        member.push(self.step_number, facts)
        rate = self.rate(self.step_number)
        self.step_number += 1
        self.samples += self.job.batch_samples
        member.pull(self.step_number)
        told = member.facts
        all_loss = loss * self.job.batch_samples / max(mine.samples, 1)
        asked = False
        if told is not None:
            all_loss, asked = float(told[:, 0].sum()), bool(told[:, 2].sum())
        ids = self.stream.ids(mine.first, mine.samples)
        found = (self.step_number, self.samples, all_loss, norm, rate, asked, ids)
        dense = dense_bytes(self.flat.gradient.nbytes, world.size)
        return StepReport(*found, member.moved_bytes - sent_before, dense)

    def _gradient(self, mine: Share) -> float:
        """Of the worker's share, as a part of the whole batch's mean; its part of the loss."""
        self.flat.clear_gradient()
        total, end = 0.0, mine.first + mine.samples
        for first in range(mine.first, end, self.job.micro_samples):
            count = min(self.job.micro_samples, end - first)
            loss = self.model.loss(self.stream.batch(first, count)) / self.job.run.batch_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _mine(self, world: World) -> Share:
        """Equal shares, or by the speeds that all told with one and the same wave."""
        first, count, rank = self.samples, self.job.batch_samples, world.rank
        told = self.member.facts if self.job.workers.shares == "measured" else None
        if told is None or not bool((told[:, 1] > 0).all()):
            return share_out(first, count, rank, world.size)
        counts = shares(count, told[:, 1].tolist(), self.job.micro_samples)
        return Share(first + sum(counts[:rank]), counts[rank])

    def _measured(self, samples: int, seconds: float) -> None:
        if samples and seconds > 0:
            now = samples / seconds
            self._per_s = KEEP * self._per_s + (1 - KEEP) * now if self._per_s else now

    def settle(self) -> None:
        """All workers have come to the same step: the weights of exactly that one."""
        self.member.settle(self.step_number)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: what this process is the server of."""
        self.settle()
        return self.member.pieces()

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        self.member.restore(found)
        self.step_number, self.samples = found.step, found.meta["samples"]

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        self.settle()
        return shared_nats(self.model.loss, rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        self.settle()
        return self.flat.named(self.flat.weights)
