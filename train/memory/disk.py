"""ZeRO-Infinity's disk tier: a `Trainer` whose weights, gradient, masters and moments are in files.

What is in memory at once: a layer's weights and gradient and the next one's weights, inputs of
layers, and in the update two segments of each kind. Workers each keep all files; their gradients
are summed segment by segment.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from train.data.stream import SampleStream, share
from train.job import Job
from train.layout import Slot
from train.memory.plan import MOMENTS, disk_kinds
from train.memory.segments import Layout, Segment, lay_out
from train.memory.streamed import StreamedLlama
from train.memory.tier import Tier
from train.optimizer import Decay, adamw_update
from train.precision import COMPUTE, master_dtype
from train.schedule import factor
from train.state import TrainState
from train.step import StepReport, refuse_infinite
from train.weights import Start, first_values
from train.world import World


class FileModel:
    """What `FlatModel` is to others, of a model in files: flat tensors, and names for their parts.
    Their order is the files'."""

    def __init__(self, layout: Layout, tier: Tier) -> None:
        self.tier, self.slots = tier, layout.slots

    @property
    def weights(self) -> Tensor:
        """As computed with, mapped."""
        return self.tier.mapped("param")

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Parts of a flat tensor by the parameters' names."""
        return {slot.name: _part(flat, slot) for slot in self.slots}


class DiskTrainer:
    """As `train.step.Trainer`, to whoever drives it."""

    def __init__(self, job: Job, start: Start, stream: SampleStream, folder: Path) -> None:
        """Lays the files, with the first weights. folder: of this worker alone."""
        self.job, self.stream = job, stream
        compute = COMPUTE[job.precision.compute]
        self.master = "param" if compute == master_dtype(compute) else "master"
        layout = lay_out(start.config, job.memory.tile_bytes // compute.itemsize)
        self.layout, self.tier = layout, Tier(folder, layout.elements, disk_kinds(compute))
        self.flat = FileModel(layout, self.tier)
        self.model = StreamedLlama(layout, self.tier)
        self.step_number = self.samples = 0
        self.before_update: Callable[[], None] = lambda: None
        fill = first_values(job, start)
        with torch.no_grad():
            for name, place in self.flat.named(self.tier.mapped(self.master)).items():
                fill(name, place)
        self._publish_whole()

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Trainer.step`. Only the gradient changes until all workers' are summed."""
        self.tier.settle()
        mine = share(self.samples, self.job.batch_samples, world.rank, world.size)
        size, last = self.job.micro_samples, mine.first + mine.samples
        micros = [
            self.stream.batch(first, min(size, last - first))
            for first in range(mine.first, last, size)
        ]
        totals = self.model.gradient(micros, self.job.run.batch_tokens, world)
        sums = torch.tensor([float(totals.loss), float(stop)], dtype=torch.float64)
        world.all_reduce(sums)
        norm = math.sqrt(totals.squares)
        refuse_infinite(norm, self.step_number + 1, self.job)
        rate = self.job.optimizer.learning_rate
        rate *= factor(self.job.schedule, self.step_number, self.job.steps)
        self.before_update()
        self._update(norm, rate)
        self.step_number += 1
        self.samples += self.job.batch_samples
        ids = self.stream.ids(mine.first, mine.samples)
        loss, asked = float(sums[0]), bool(sums[1])
        return StepReport(self.step_number, self.samples, loss, norm, rate, asked, ids)

    def state(self) -> TrainState:
        """See `Trainer.state`; the tensors are mapped from the files."""
        kinds = dict.fromkeys(("param", self.master, *MOMENTS))
        tensors = {
            f"{kind}/{name}": part
            for kind in kinds
            for name, part in self.flat.named(self.tier.mapped(kind)).items()
        }
        return TrainState(self.step_number, self.samples, tensors)

    def load(self, state: TrainState) -> None:
        """See `Trainer.load`; also from a state that was written without offloading."""
        state.copy_to(self.state())
        self.tier.flush()
        self.step_number, self.samples = state.step, state.samples

    def close(self) -> None:
        """Ends the threads."""
        self.tier.close()

    def _update(self, norm: float, rate: float) -> None:
        limit = self.job.optimizer.clip_norm
        scale = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        kinds = ("gradient", self.master, *MOMENTS)
        segments = self.layout.segments
        for kind in kinds:
            self.tier.hint(kind, segments[0])
        for number, segment in enumerate(segments):
            gradient, masters, *moments = [self.tier.take(kind, segment) for kind in kinds]
            for kind in kinds if number + 1 < len(segments) else ():
                self.tier.hint(kind, segments[number + 1])
            if scale != 1.0:
                gradient.mul_(scale)
            self._adamw(segment, gradient, masters, (moments[0], moments[1]), rate)
            self.tier.release(gradient)
            self._put(segment, masters, (moments[0], moments[1]))

    def _adamw(
        self,
        segment: Segment,
        gradient: Tensor,
        masters: Tensor,
        moments: tuple[Tensor, Tensor],
        rate: float,
    ) -> None:
        table = self.job.optimizer
        middle, end = segment.decayed, segment.elements
        for part, decay in ((slice(0, middle), table.weight_decay), (slice(middle, end), 0.0)):
            adamw_update(
                masters[part],
                gradient[part],
                (moments[0][part], moments[1][part]),
                step=self.step_number + 1,
                learning_rate=rate,
                decay=Decay(table.beta1, table.beta2, table.epsilon, decay),
            )

    def _put(self, segment: Segment, masters: Tensor, moments: tuple[Tensor, Tensor]) -> None:
        if self.master != "param":
            weights = self.tier.buffer("param", segment)
            self.tier.put("param", segment, weights.copy_(masters))
        self.tier.put(self.master, segment, masters)
        for kind, moment in zip(MOMENTS, moments, strict=True):
            self.tier.put(kind, segment, moment)

    def _publish_whole(self) -> None:
        """Weights from masters, through the page cache; before the first step."""
        if self.master != "param":
            masters, weights = self.tier.mapped(self.master), self.tier.mapped("param")
            for segment in self.layout.segments:
                span = slice(segment.start, segment.start + segment.elements)
                weights[span] = masters[span]
        self.tier.flush()


def _part(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.start : slot.stop].view(slot.shape)
