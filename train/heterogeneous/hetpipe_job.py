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

from train.checkpoint.piece import Piece, dtype_name
from train.checkpoint.reader import Checkpoint, read_checked
from train.communication.transport import dense_bytes
from train.data.stream import SampleStream, Share
from train.data.stream import share as share_out
from train.heterogeneous.hetpipe_server import Pulled, Rule, Shard, Stretch
from train.heterogeneous.hetpipe_wire import Door, Servers, open_doors, stretches
from train.heterogeneous.shares import shares
from train.job import Job
from train.layout import FlatModel
from train.learner import shared_nats
from train.model import Llama
from train.parallel.zero_flat import best_name
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
        assert job.workers.staleness is not None
        self.job, self.model, self.stream, self._clock = job, model, stream, clock
        self.flat = FlatModel(model, COMPUTE[job.precision.compute])
        self.parameters = self.flat.masters.numel()
        self.bound = job.workers.staleness
        self.step_number = self.samples = 0
        self.before_update: Callable[[], None] = lambda: None
        self._anticipates = job.optimizer.name == "sgd" and not job.optimizer.beta1
        self._own_waves: dict[int, Tensor] = {}
        self._per_s = 0.0
        self._facts: Tensor | None = None
        self._shard: Shard | None = None
        self._servers: Servers | None = None
        self._begun = False

    @property
    def shard(self) -> Shard:
        """This process' part of the parameter server."""
        assert self._shard is not None, "enter comes first"
        return self._shard

    @property
    def servers(self) -> Servers:
        """The way to all parts."""
        assert self._servers is not None, "enter comes first"
        return self._servers

    def enter(self, world: World) -> None:
        """See `Learner`: opens this process' server, and finds the others'."""
        all_ = stretches(self.parameters, world.size)
        self.own = all_[world.rank]
        masters = self.flat.masters[slice(*self.own)].clone()
        last = max(0, min(self.flat.decayed, self.own.stop) - self.own.start)
        decayed = [Stretch(0, last)] if last else []
        rule = Rule(masters, decayed, self.job.optimizer, self.rate)
        self._shard = Shard(rule, world.size, self.bound)
        self.door = Door(self._shard)
        ports = open_doors(world, self.door)
        self._servers = Servers(world.rank, all_, ports, {world.rank: self._shard})

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
        mine, sent_before = self._mine(world), self._moved()
        begun_s = self._clock()
        loss = self._gradient(mine)
        norm = float(torch.linalg.vector_norm(self.flat.gradient))
        refuse_infinite(norm, self.step_number + 1, self.job)
        self._measured(mine.samples, self._clock() - begun_s)
        self.before_update()
        facts = torch.tensor([loss, self._per_s, float(stop)], dtype=torch.float64)
        self.servers.push(self.step_number, 0, self.flat.gradient, facts)
        if self._anticipates:
            self._own_waves[self.step_number] = self.flat.gradient.clone()
        rate = self.rate(self.step_number)
        self.step_number += 1
        self.samples += self.job.batch_samples
        self._take_up(self.servers.pull(self.step_number, 0, self.flat.masters))
        told = self._facts
        all_loss = loss * self.job.batch_samples / max(mine.samples, 1)
        asked = False
        if told is not None:
            all_loss, asked = float(told[:, 0].sum()), bool(told[:, 2].sum())
        ids = self.stream.ids(mine.first, mine.samples)
        found = (self.step_number, self.samples, all_loss, norm, rate, asked, ids)
        dense = dense_bytes(self.flat.gradient.nbytes, world.size)
        return StepReport(*found, self._moved() - sent_before, dense)

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
        told = self._facts if self.job.workers.shares == "measured" else None
        if told is None or not bool((told[:, 1] > 0).all()):
            return share_out(first, count, rank, world.size)
        counts = shares(count, told[:, 1].tolist(), self.job.micro_samples)
        return Share(first + sum(counts[:rank]), counts[rank])

    def _measured(self, samples: int, seconds: float) -> None:
        if samples and seconds > 0:
            now = samples / seconds
            self._per_s = KEEP * self._per_s + (1 - KEEP) * now if self._per_s else now

    def _take_up(self, found: Sequence[Pulled]) -> None:
        """What was pulled, and with plain SGD own waves that are not in it yet."""
        at = 0
        for pulled in found:
            size = pulled.weights.numel()
            for own, gradient in self._own_waves.items():
                if own >= pulled.version:
                    part = gradient[at : at + size]
                    self.flat.masters[at : at + size].add_(part, alpha=-self.rate(own))
            at += size
        oldest = min(pulled.version for pulled in found)
        self._own_waves = {n: g for n, g in self._own_waves.items() if n >= oldest}
        self._facts = found[0].facts
        self.flat.publish()

    def _settle(self) -> None:
        """All workers have come to the same step: the weights of exactly that one."""
        told = self._facts
        found = self.servers.pull(self.step_number, 0, self.flat.masters, exact=True)
        self._take_up(found)
        self._facts = told

    def _moved(self) -> int:
        """Bytes that left this process: what it asked and pushed, and answered as a server."""
        return self.servers.sent_bytes + self.door.sent_bytes

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: what this process is the server of; weights where they are narrower."""
        self._settle()
        flats = {"param": self.flat.weights[slice(*self.own)]}
        if self.flat.weights is not self.flat.masters:
            flats["master"] = self.shard.rule.masters
        else:
            flats["param"] = self.shard.rule.masters
        flats |= self.shard.rule.moments
        return [piece for kind, held in flats.items() for piece in self._of_kind(kind, held)]

    def _of_kind(self, kind: str, held: Tensor) -> list[Piece]:
        found = []
        for slot in self.flat.slots:
            low, high = max(slot.start, self.own.start), min(slot.stop, self.own.stop)
            if low < high:
                data = held[low - self.own.start : high - self.own.start]
                place = (low - slot.start, high - slot.start)
                found.append(
                    Piece(f"{kind}/{slot.name}", slot.shape, dtype_name(held.dtype), *place, data)
                )
        return found

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        rule = self.shard.rule
        for slot in self.flat.slots:
            values = read_checked(found, best_name(found, slot.name), slot.shape)
            self.flat.view(self.flat.masters, slot).copy_(values)
        rule.masters.copy_(self.flat.masters[slice(*self.own)])
        for kind, held in rule.moments.items():
            whole = torch.empty_like(self.flat.masters)
            for slot in self.flat.slots:
                values = read_checked(found, f"{kind}/{slot.name}", slot.shape)
                self.flat.view(whole, slot).copy_(values)
            held.copy_(whole[slice(*self.own)])
        self.flat.publish()
        self.step_number, self.samples = found.step, found.meta["samples"]
        self.shard.load(found.step)

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        self._settle()
        return shared_nats(self.model.loss, rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        self._settle()
        return self.flat.named(self.flat.weights)
