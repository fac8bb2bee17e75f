"""A learner whose virtual workers are pipelines: `pipeline.stages = N` with `workers.staleness = D`
(HetPipe, Park et al., ATC 2020).

A step is a wave: each chain computes its share of the step's samples, micro-batch by micro-batch
and all of them with the weights of the wave's start. Each stage then pushes its layers' gradient to
the servers of its layers and pulls what is newest there, which lacks at most D waves that it has
pushed itself. The servers of a stage's layers are the workers that have this stage, one of each
chain, so that what is pushed and pulled goes between workers alike; above a bound of 0 stages of a
chain may have different versions, each within the bound. The chain is empty between two waves: the
paper's minibatches that overlap in a chain are in `hetpipe_chain`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.communication.transport import dense_bytes
from train.data.stream import SampleStream
from train.heterogeneous.hetpipe_member import Member
from train.job import Job
from train.layout import FlatModel
from train.parallel.pipeline_channels import Channels
from train.parallel.pipeline_job import PipelineLearner
from train.parallel.pipeline_trainer import PipelineTrainer
from train.step import StepReport
from train.weights import Start
from train.world import World


class WaveStage(PipelineTrainer):
    """A stage whose gradient stays where it is."""

    def wave(self, world: World) -> float:
        """Forward and backward of the chain's samples of a step; gradients add up in the layers.
        The summed loss on the last stage, 0 on others."""
        place = self.layout.place(world.rank)
        assert place is not None, "chains are whole, so nobody is a spare"
        run, channels, finished = self._begin(place), Channels(world), False
        try:
            run.run(channels)
            channels.flush()
            finished = True
        finally:
            channels.close(broken=not finished)
            self.sent_bytes += channels.sent_bytes
        return sum(run.losses)


class ChainLearner(PipelineLearner):
    """A `train.learner.Learner`. Of a report, loss is that of the wave D before (of the chain's own
    share where there was none) and the norm that of the chain's own gradient. A wish to stop is
    heard by all after the same step, D after the one it came with."""

    def __init__(self, job: Job, start: Start, stream: SampleStream) -> None:
        """ValueError when the model cannot be divided."""
        super().__init__(job, start, stream)
        self._stage: WaveStage | None = None
        self._begun = False

    @property
    def stage(self) -> WaveStage:
        """This worker's layers."""
        assert self._stage is not None, "enter comes first"
        return self._stage

    def enter(self, world: World) -> None:
        """See `Learner`."""
        training = self.training()
        layout = self._layout(training, world)
        self._trainer = self._stage = stage = WaveStage(training, layout, world.rank)
        place = layout.place(world.rank)
        assert place is not None, "chains are whole, so nobody is a spare"
        self._chain = layout.chains[place.chain]
        held = {n: stage.held.modules[n] for n in layout.stage(place).layers}
        named = {
            f"{self.layers.prefix(n)}{name}": parameter
            for n, layer in held.items()
            for name, parameter in layer.named_parameters()
        }
        flat = FlatModel(nn.ModuleList(held.values()), training.model.dtype, named)
        self.member = Member(self.job, flat, self.rate)
        alike = [chain.stages[place.position].rank for chain in layout.chains]
        self.member.enter(world, alike)

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Learner`."""
        if not self._begun:  # nobody pushes to a server that still reads its checkpoint
            world.barrier()
            self._begun = True
        stage, member, flat, first = self.stage, self.member, self.member.flat, self.samples
        sent_before = member.moved_bytes
        flat.clear_gradient()
        own = stage.wave(world)
        square = float(torch.linalg.vector_norm(flat.gradient, dtype=torch.float64)) ** 2
        told = torch.tensor([own, square, float(stop)], dtype=torch.float64)
        loss, square, votes = self._of_chain(world, told).tolist()
        norm = math.sqrt(square)
        self._before_update(norm)
        # Every stage tells its servers the whole chain's, so that all hear of it at one clock.
        member.push(self.step_number, torch.tensor([loss, 0.0, votes], dtype=torch.float64))
        rate = self.rate(self.step_number)
        stage.steps += 1
        stage.samples += stage.layout.samples
        member.pull(stage.steps)
        loss, asked = loss * self.job.batch_samples / self._chain.samples, False
        if member.facts is not None:
            loss, asked = float(member.facts[:, 0].sum()), bool(member.facts[:, 2].sum())
        report = (stage.steps, stage.samples, loss, norm, rate, asked, self._ids(first, world))
        dense = dense_bytes(flat.gradient.nbytes, len(stage.layout.chains))
        return StepReport(*report, member.moved_bytes - sent_before, dense)

    def _of_chain(self, world: World, mine: Tensor) -> Tensor:
        """The sum over the chain's stages, on each of them."""
        head, *others = [stage.rank for stage in self._chain.stages]
        if world.rank != head:
            world.send(mine, head)
            world.recv(mine, head)
            return mine
        for other in others:
            told = torch.empty_like(mine)
            world.recv(told, other)
            mine += told
        for other in others:
            world.send(mine, other)
        return mine

    def settle(self) -> None:
        """All workers have come to the same step: the weights of exactly that one."""
        self.member.settle(self.step_number)

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: what this process is the server of."""
        self.settle()
        return self.member.pieces()

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`."""
        self.member.restore(found)
        self.stage.steps, self.stage.samples = found.step, found.meta["samples"]

    def nats(self, rows: Sequence[Tensor], world: World) -> float:
        """See `Learner`."""
        self.settle()
        return super().nats(rows, world)

    def exported(self, world: World) -> dict[str, Tensor]:
        """See `Learner`."""
        self.settle()
        return super().exported(world)
