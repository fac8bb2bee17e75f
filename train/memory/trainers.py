"""The trainer that a job's `[memory]` asks for, as `train.run.Run` uses it."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from train.data.stream import SampleStream
from train.folder import RunFolder
from train.job import Job
from train.layout import Slot
from train.memory.activations import CodedLayers, install
from train.memory.disk import DiskTrainer
from train.memory.offload import OffloadTrainer
from train.memory.plan import offload_folder
from train.state import TrainState
from train.step import StepReport, Trainer
from train.weights import Start, build_model
from train.world import World


class Flat(Protocol):
    """A model's weights as one tensor, and names for its parts."""

    @property
    def slots(self) -> tuple[Slot, ...]: ...
    @property
    def weights(self) -> Tensor: ...
    def named(self, flat: Tensor) -> dict[str, Tensor]: ...


class Scores(Protocol):
    """A model that says how likely tokens are."""

    def loss(self, tokens: Tensor) -> Tensor:
        """Summed nats; see `Llama.loss`."""
        ...


class RunTrainer(Protocol):
    """What a run asks of a trainer; `train.step.Trainer` says it in full."""

    @property
    def step_number(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def flat(self) -> Flat: ...
    @property
    def model(self) -> Scores: ...
    def step(self, world: World, stop: bool = False) -> StepReport: ...
    def state(self) -> TrainState: ...
    def load(self, state: TrainState) -> None: ...


class CodedTrainer:
    """A trainer and the codec that its model's layers save through, whose state (ranges, bits) is
    in the meta part of a checkpoint: rank 0's, when there are several."""

    def __init__(self, inner: Trainer, coded: CodedLayers) -> None:
        self.inner, self.coded = inner, coded

    @property
    def step_number(self) -> int:
        """Finished steps."""
        return self.inner.step_number

    @property
    def samples(self) -> int:
        """Consumed."""
        return self.inner.samples

    @property
    def flat(self) -> Flat:
        """See `Flat`."""
        return self.inner.flat

    @property
    def model(self) -> Scores:
        """See `Scores`."""
        return self.inner.model

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Trainer.step`."""
        return self.inner.step(world, stop)

    def state(self) -> TrainState:
        """See `Trainer.state`."""
        state = self.inner.state()
        kept = {type(self.coded.codec).__name__: self.coded.codec.state()}
        return replace(state, meta=state.meta | {"codec": kept})

    def load(self, state: TrainState) -> None:
        """See `Trainer.load`. A state of another codec, or of none, leaves this one fresh."""
        self.inner.load(state)
        kept = state.meta.get("codec", {}).get(type(self.coded.codec).__name__)
        if kept is not None:
            self.coded.codec.load(kept)


def build_trainer(job: Job, folder: RunFolder, start: Start, stream: SampleStream) -> RunTrainer:
    """With the first weights. OSError when the files of offloading cannot be made."""
    if job.memory.activations == "keep" and job.memory.offload == "none":
        return Trainer(job, build_model(job, start), stream)
    place = offload_folder(job, folder)
    if job.memory.offload == "disk":
        assert place is not None
        return DiskTrainer(job, start, stream, place)
    if job.memory.offload == "cpu":
        trainer: Trainer = OffloadTrainer(job, start, stream, place)
    else:
        trainer = Trainer(job, build_model(job, start), stream)
    coded = install(trainer.model, job.memory, job.run.seed)
    return trainer if coded is None else CodedTrainer(trainer, coded)
