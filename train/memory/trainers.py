"""The trainer that a job's `[memory]` asks for."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

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


class MemoryTrainer(Protocol):
    """What `train.memory.learner` asks of a trainer; `train.step.Trainer` says it in full."""

    before_update: Callable[[], None]

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


class Built(NamedTuple):
    """A trainer, and the codec that its model's layers save through, if they do."""

    trainer: MemoryTrainer
    coded: CodedLayers | None = None


def build_trainer(job: Job, folder: RunFolder, start: Start, stream: SampleStream) -> Built:
    """With the first weights. OSError when the files of offloading cannot be made."""
    place = offload_folder(job, folder)
    if job.memory.offload == "disk":
        assert place is not None
        return Built(DiskTrainer(job, start, stream, place))
    if job.memory.offload == "cpu":
        trainer: Trainer = OffloadTrainer(job, start, stream, place)
    else:
        trainer = Trainer(job, build_model(job, start), stream)
    return Built(trainer, install(trainer.model, job.memory, job.run.seed))
