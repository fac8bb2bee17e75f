"""A training step, on one screen: the worker's share of samples, their summed gradient over all
workers, one clipped update.

`Trainer` has the state of a run in memory. If a `WorldChanged` ends a step, the state is that of
the last finished step, and `step` can be called again with another world.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from train.communication.exchange import Exchange
from train.data.stream import SampleStream
from train.heterogeneous.shares import Equal, Shares
from train.job import Job
from train.layout import FlatModel
from train.model import Llama
from train.precision import COMPUTE
from train.schedule import factor
from train.state import TrainState
from train.world import World


@dataclass(frozen=True)
class StepReport:
    """A finished step, the same on every worker but for `ids`.

    step: from 1; samples: consumed after it; loss: nats per token before the update;
    stop: whether a worker asked for an end; ids: samples that this worker computed; sent_bytes,
    dense_bytes: what it sent for the gradient's sum, and would have sent uncompressed.
    """

    step: int
    samples: int
    loss: float
    gradient_norm: float
    learning_rate: float
    stop: bool
    ids: list[int]
    sent_bytes: int = 0
    dense_bytes: int = 0


class Trainer:
    """One worker's model, optimizer and place in the stream."""

    def __init__(
        self,
        job: Job,
        model: Llama,
        stream: SampleStream,
        shares: Shares | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """shares: how a step's samples are shared out, equally by default; clock: in seconds."""
        self.job, self.model, self.stream = job, model, stream
        self.shares: Shares = shares or Equal()
        self._clock = clock
        self.flat = FlatModel(model, COMPUTE[job.precision.compute])
        self.exchange = Exchange(job, self.flat)
        self.optimizer = self.exchange.optimizer
        self.step_number = self.samples = 0
        self.before_update: Callable[[], None] = lambda: None
        """Called in each step before the first change of the state."""

    def step(self, world: World, stop: bool = False) -> StepReport:
        """One optimizer step with all workers of the world. stop: this one asks for an end."""
        mine = self.shares.mine(self.samples, self.job.batch_samples, world)
        begun_s = self._clock()
        flat, summed = self.flat, self.flat.summed
        flat.clear_gradient()
        tokens, end = self.job.run.batch_tokens, mine.first + mine.samples
        self.exchange.begin(world, self.step_number + 1)
        for first in range(mine.first, end, self.job.micro_samples):
            count = min(self.job.micro_samples, end - first)
            if first + count == end:
                self.exchange.follow()
            loss = self.model.loss(self.stream.batch(first, count)) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            summed[-2] += loss.detach()
        self.shares.computed(mine.samples, self._clock() - begun_s)
        summed[-1] = float(stop)
        norm = self.exchange.sum()
        refuse_infinite(norm, self.step_number + 1, self.job)
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.before_update()
        self.optimizer.update(self.step_number + 1, rate)
        flat.publish()
        self.step_number += 1
        self.samples += self.job.batch_samples
        ids = self.stream.ids(mine.first, mine.samples)
        loss_nats, asked = float(summed[-2]), bool(summed[-1])
        told = (self.step_number, self.samples, loss_nats, norm, rate, asked, ids)
        return StepReport(*told, self.exchange.sent_bytes, self.exchange.dense_bytes)

    def state(self) -> TrainState:
        """The run as it stands, its tensors live."""
        named = self.flat.named
        tensors = {f"param/{name}": tensor for name, tensor in named(self.flat.weights).items()}
        if self.flat.weights is not self.flat.masters:
            tensors |= {f"master/{name}": t for name, t in named(self.flat.masters).items()}
        tensors |= self.optimizer.tensors()
        return TrainState(self.step_number, self.samples, tensors, ranks=self.exchange.memory())

    def load(self, state: TrainState) -> None:
        """Goes on from a state of the same job, whose values are copied. ValueError when it is of
        another model or optimizer."""
        state.copy_to(self.state())
        self.exchange.load(state.ranks)
        self.step_number, self.samples = state.step, state.samples


def refuse_infinite(norm: float, step: int, job: Job) -> None:
    """ValueError when a gradient's norm is no number to go on with."""
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient is not finite; "
            f"optimizer.learning_rate = {job.optimizer.learning_rate} may be too high"
        )
