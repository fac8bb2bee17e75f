"""A learner that holds some of the model's layers: a worker of a job with `pipeline.stages`.

The form (who runs which layers of which samples) follows from the job and the number of workers:
equal chains, Oobleck's templates, or the fastest by Varuna's measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.piece import Piece, stretch
from train.checkpoint.reader import Checkpoint, read_checked
from train.data.stream import SampleStream
from train.job import Job
from train.parallel.pipeline_layers import STATE, AdamW
from train.parallel.pipeline_layout import Layout, cut_spans, grid
from train.parallel.pipeline_model import JobLayers
from train.parallel.pipeline_trainer import PipelineTrainer, Training
from train.resilience.bamboo import BambooTrainer
from train.resilience.oobleck import OobleckTrainer, first_layout
from train.resilience.templates import Cutter, Planner
from train.resilience.varuna import measure, measure_link
from train.resilience.varuna_simulator import Measured, choose
from train.schedule import factor
from train.step import StepReport, refuse_infinite
from train.weights import Start
from train.world import World


class PipelineLearner:
    """A `train.learner.Learner` of layers. May `enter` again: with the first weights, in the form
    for the workers that are there."""

    def __init__(self, job: Job, start: Start, stream: SampleStream) -> None:
        """ValueError when the model cannot be divided."""
        self.job, self.stream = job, stream
        self.layers = JobLayers(job, start)
        shapes = [self.layers.shapes(n).values() for n in range(self.layers.count)]
        self.parameters = sum(torch.Size(shape).numel() for each in shapes for shape in each)
        self.before_update: Callable[[], None] = lambda: None
        self._trainer: PipelineTrainer | None = None
        self._measured: Measured | None = None

    @property
    def trainer(self) -> PipelineTrainer:
        """The stage, once the worker has its place."""
        assert self._trainer is not None, "enter comes first"
        return self._trainer

    @property
    def step_number(self) -> int:
        """Finished steps."""
        return self._trainer.steps if self._trainer else 0

    @property
    def samples(self) -> int:
        """Consumed so far."""
        return self._trainer.samples if self._trainer else 0

    def enter(self, world: World) -> None:
        """See `Learner`. ValueError where so many workers make no pipeline."""
        training, mode = self.training(), self.job.resilience.mode
        if mode == "oobleck":
            planner = self._planner()
            samples, micro = self.job.batch_samples, self.job.micro_samples
            layout = first_layout(planner, world.size, samples, micro)
            self._trainer = OobleckTrainer(training, planner, layout, world.rank)
            return
        kind = BambooTrainer if mode == "bamboo" else PipelineTrainer
        self._trainer = kind(training, self._layout(training, world), world.rank)

    def training(self) -> Training:
        """The job as pipelines have it."""
        table = self.job.optimizer
        update = AdamW(
            lr=self.rate,
            betas=(table.beta1, table.beta2),
            eps=table.epsilon,
            weight_decay=table.weight_decay,
            vector_decay=0.0,
        )
        return Training(
            self.layers.layered(),
            self._batches,
            update,
            1 / self.job.run.batch_tokens,
            clip_norm=table.clip_norm,
            before_update=self._before_update,
        )

    def rate(self, step: int) -> float:
        """The learning rate after so many finished steps."""
        share = factor(self.job.schedule, step, self.job.steps)
        return self.job.optimizer.learning_rate * share

    def _batches(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        tokens = self.stream.batch(first, count)
        return tokens[:, :-1], tokens[:, 1:]

    def _before_update(self, norm: float) -> None:
        refuse_infinite(norm, self.step_number + 1, self.job)
        self.before_update()

    def _layout(self, training: Training, world: World) -> Layout:
        job, size = self.job, world.size
        if job.resilience.mode == "varuna":
            costs = self._measure(training, world)
            least = job.pipeline.stages
            return choose(costs, size, job.batch_samples, job.micro_samples, least).layout
        stages = min(job.pipeline.stages, size)
        chains = min(size // stages, job.batch_samples)
        micros = -(-job.batch_samples // (chains * job.micro_samples))
        if job.pipeline.cuts:
            spans = cut_spans(self.layers.count, job.pipeline.cuts)
            if size < len(spans):
                raise ValueError(
                    f"pipeline.cuts = {list(job.pipeline.cuts)} are of {len(spans)} workers and "
                    f"there are {size}: {len(spans)} or more are accepted, or pipeline.cuts = []"
                )
            return grid(spans, chains, job.batch_samples, job.micro_samples)
        template = Cutter(self.layers.costs()).template(stages, micros)
        assert template is not None, "no limit of memory, and stages are at most as many as layers"
        return grid(template.spans, chains, job.batch_samples, job.micro_samples)

    def _planner(self) -> Planner:
        job = self.job
        micros = -(-job.batch_samples // job.micro_samples)
        table = job.resilience
        return Planner(self.layers.costs(), micros, table.failures, job.pipeline.stages)

    def _measure(self, training: Training, world: World) -> Measured:
        """Rank 0's times of the layers and the link between two workers, told to all."""
        link = measure_link(world) if world.size > 1 else (0.0, 1e12)
        rows = torch.zeros(len(MEASURED), self.layers.count, dtype=torch.float64)
        if world.rank == 0:
            if self._measured is None:
                self._measured = measure(training, self.job.micro_samples, *link)
            found = self._measured
            rows = torch.tensor([getattr(found, name) for name in MEASURED], dtype=torch.float64)
        world.broadcast(rows, 0)
        named: dict[str, Any] = dict(zip(MEASURED, map(tuple, rows.tolist()), strict=True))
        return Measured(**named, latency_s=link[0], bytes_per_s=link[1])

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        trainer, first = self.trainer, self.samples
        trainer.vote = stop
        trainer.step(world)
        return replace(self.last_report(), stop=trainer.asked, ids=self._ids(first, world))

    def last_report(self) -> StepReport:
        """Of the last finished step, whoever ended it."""
        trainer = self.trainer
        step, loss = trainer.steps, trainer.losses[trainer.steps]
        rate = self.rate(step - 1)
        return StepReport(step, trainer.samples, loss, trainer.norm, rate, False, [])

    def _ids(self, first: int, world: World) -> list[int]:
        """Samples that enter the pipeline here."""
        place = self.trainer.layout.place(world.rank)
        if place is None or place.position:
            return []
        chain = self.trainer.layout.chains[place.chain]
        return self.stream.ids(first + chain.first, chain.samples)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: whole layers, layer n by chain n modulo the number of chains."""
        layout = self.trainer.layout
        place = layout.place(world.rank)
        if place is None:
            return []
        mine = [n for n in layout.stage(place).layers if n % len(layout.chains) == place.chain]
        held = self.trainer.held
        named = {name: t for layer in mine for name, t in held.tensors(layer).items()}
        return [stretch(name, tensor, 0, tensor.numel()) for name, tensor in named.items()]

    def notes(self) -> dict[str, Any]:
        """See `Learner`."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        held = self.trainer.held
        for layer in list(held.modules):
            shapes = self.layers.shapes(layer)
            wanted = {f"{kind}/{name}": shapes[name] for kind in STATE for name in shapes}
            tensors = {name: read_checked(found, name, shape) for name, shape in wanted.items()}
            held.load(layer, tensors, found.step)
        self.trainer.steps, self.trainer.samples = found.step, found.meta["samples"]

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`: every chain passes its part of the rows on from stage to stage."""
        layout, total = self.trainer.layout, torch.zeros(1, dtype=torch.float64)
        place = layout.place(world.rank)
        if place is not None:
            stages, p = layout.chains[place.chain].stages, place.position
            before = stages[p - 1].rank if p else None
            after = stages[p + 1].rank if p + 1 < len(stages) else None
            with torch.no_grad():
                for row in rows[place.chain :: len(layout.chains)]:
                    total += self._pass_on(row, world, before, after)
        world.all_reduce(total)
        return float(total)

    def _pass_on(self, row: Tensor, world: World, before: int | None, after: int | None) -> float:
        place = self.trainer.layout.place(world.rank)
        assert place is not None
        model = self.trainer.training.model
        value = row[:, :-1]
        if before is not None:
            value = torch.empty(model.boundary(1), dtype=model.dtype)
            world.recv(value, before)
        for layer in self.trainer.layout.stage(place).layers:
            value = self.trainer.held.modules[layer](value)
        if after is not None:
            world.send(value.contiguous(), after)
            return 0.0
        return float(model.loss(value, row[:, 1:]))

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`: rank 0 is sent what it lacks, one parameter after another."""
        layout, found = self.trainer.layout, dict[str, Tensor]()
        dtype = self.trainer.training.model.dtype
        for layer in range(layout.layers):
            source = layout.holders(layer)[0]
            named = self.trainer.held.tensors(layer) if source == world.rank else {}
            for name, shape in self.layers.shapes(layer).items():
                if source == world.rank:
                    found[name] = named[f"param/{name}"]
                    if world.rank:
                        world.send(found[name].contiguous(), 0)
                elif world.rank == 0:
                    found[name] = torch.empty(shape, dtype=dtype)
                    world.recv(found[name], source)
        return found


MEASURED = (
    "forward_s",
    "backward_s",
    "update_s",
    "gradient_bytes",
    "state_bytes",
    "boundary_bytes",
)
"""What `Measured` has of each layer, in its order."""
