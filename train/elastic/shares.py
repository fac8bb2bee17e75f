"""A job whose state is shared out among workers that come and go (`resilience.mode = "gemini"`):
weights and the summed gradient are everywhere, masters and moments in equal stretches of the flat
order (ZeRO's stage 1), each stretch also in peers' memory (`train.elastic.peers`).

Updates have the bits that they have on workers that hold everything. A step sends what those send,
and the new weights once more.
"""

import time

import torch
from torch import Tensor

from train.checkpoint.piece import Piece, dtype_name
from train.checkpoint.reader import Checkpoint, read_checked
from train.communication.exchange import Exchange
from train.data.stream import SampleStream, share
from train.elastic.facts import share_facts
from train.elastic.messages import Version
from train.elastic.run import ElasticRun
from train.elastic.trainee import Flat, StepEnd
from train.heterogeneous.shares import Equal
from train.job import Job, OptimizerTable
from train.layout import FlatModel, Slot
from train.learner import Whole
from train.model import Llama
from train.optimizer import Decay, adamw_update
from train.precision import COMPUTE
from train.state import TrainState
from train.weights import build_model, read_start
from train.world import World

KINDS = ("master", "exp_avg", "exp_avg_sq")


class SharedFlat(FlatModel):
    """Weights and gradient whole; masters are somebody's share."""

    def publish(self) -> None:
        """The update has done it."""


class SharedAdamW:
    """AdamW on this worker's stretch, and everybody's new weights afterwards."""

    def __init__(self, flat: SharedFlat, table: OptimizerTable) -> None:
        self.flat, self.table = flat, table
        self.own: dict[str, Tensor] = {}
        self.first = self.last = 0
        self._world: World | None = None

    def take(self, world: World, own: dict[str, Tensor]) -> None:
        """This worker's stretch in a world, which is copied; everybody's weights follow."""
        self._world = world
        mine = share(0, self.flat.weights.numel(), world.rank, world.size)
        self.first, self.last = mine.first, mine.first + mine.samples
        self.own = {kind: own[kind].clone() for kind in KINDS}
        self._publish()

    def update(self, step: int, learning_rate: float) -> None:
        """See `train.optimizer.Optimizer`."""
        table, middle = self.table, min(max(self.flat.decayed, self.first), self.last)
        parts = ((self.first, middle, table.weight_decay), (middle, self.last, 0.0))
        for first, last, weight_decay in parts:
            own = slice(first - self.first, last - self.first)
            adamw_update(
                self.own["master"][own],
                self.flat.gradient[first:last],
                (self.own["exp_avg"][own], self.own["exp_avg_sq"][own]),
                step=step,
                learning_rate=learning_rate,
                decay=Decay(table.beta1, table.beta2, table.epsilon, weight_decay),
            )
        self._publish()

    def _publish(self) -> None:
        """Stretches differ by one element at most, so each is sent with room for one."""
        assert self._world is not None, "take comes first"
        weights, world = self.flat.weights, self._world
        mine = torch.zeros(-(-weights.numel() // world.size), dtype=weights.dtype)
        mine[: self.last - self.first] = self.own["master"]
        for rank, received in enumerate(world.all_gather(mine)):
            theirs = share(0, weights.numel(), rank, world.size)
            stretch = weights[theirs.first : theirs.first + theirs.samples]
            stretch.copy_(received[: theirs.samples])

    def tensors(self) -> dict[str, Tensor]:
        """Nothing that is whole."""
        return {}


class SharedOut(Whole):
    """A `train.learner.Learner` that holds its share of masters and moments."""

    def __init__(self, job: Job, model: Llama, stream: SampleStream) -> None:
        self.job, self.model, self.stream = job, model, stream
        self.flat = SharedFlat(model, COMPUTE[job.precision.compute])
        self.wide = self.flat.masters.dtype
        self.flat.masters = self.flat.masters[:0]
        self.shared = SharedAdamW(self.flat, job.optimizer)
        self.exchange = Exchange(job, self.flat, self.shared)
        self.optimizer = self.shared
        self.shares, self._clock = Equal(), time.perf_counter
        self.step_number = self.samples = 0
        self.before_update = lambda: None
        self._world: World | None = None

    @property
    def parameters(self) -> int:
        """See `Learner`."""
        return self.flat.weights.numel()

    def flats(self) -> dict[str, Flat]:
        """See `ShardedTrainee`."""
        return {kind: Flat(self.parameters, self.wide) for kind in KINDS}

    def shard(self) -> TrainState:
        """See `ShardedTrainee`."""
        return TrainState(self.step_number, self.samples, self.shared.own)

    def load_shard(self, world: World, state: TrainState | None) -> None:
        """See `ShardedTrainee`."""
        self._world = world
        state = state or self._first_shard(world)
        self.shared.take(world, state.tensors)
        self.step_number, self.samples = state.step, state.samples

    def _first_shard(self, world: World) -> TrainState:
        """What a fresh run begins with."""
        mine = share(0, self.parameters, world.rank, world.size)
        begun = FlatModel(build_model(self.job, read_start(self.job)), self.wide)
        master = begun.masters[mine.first : mine.first + mine.samples]
        moments = {kind: torch.zeros_like(master) for kind in KINDS[1:]}
        return TrainState(0, 0, {"master": master, **moments})

    def enter(self, world: World) -> None:
        """See `Learner`."""
        self.load_shard(world, None)

    def restore(self, found: Checkpoint) -> None:
        """See `Learner`; collective here."""
        assert self._world is not None, "enter comes first"
        mine = share(0, self.parameters, self._world.rank, self._world.size)
        tensors = {kind: self.read(found, kind, mine.first, mine.samples) for kind in KINDS}
        self.load_shard(self._world, TrainState(found.step, found.meta["samples"], tensors))

    def read(self, found: Checkpoint, kind: str, first: int, count: int) -> Tensor:
        """A stretch of a vector of the flat order, from a checkpoint by parameters. ValueError when
        it is of another model."""
        out = torch.empty(count, dtype=self.wide)
        for slot, start, stop in self._within(first, first + count):
            name = f"{self._kept_as(kind)}/{slot.name}"
            if name not in found.names or found.shape(name) != slot.shape:
                read_checked(found, name, slot.shape)  # says what is amiss
            part = found.read(name, start - slot.start, stop - slot.start)
            out[start - first : stop - first] = part
        return out

    def pieces(self, world: World) -> list[Piece]:
        """See `Learner`: this worker's stretch, by parameters."""
        held, first = dict(self.shared.own), self.shared.first
        last = self.shared.last
        if self._kept_as("master") == "param":
            held["param"] = held.pop("master")
        else:
            held["param"] = self.flat.weights[first:last]
        made = []
        for slot, start, stop in self._within(first, last):
            span = (start - slot.start, stop - slot.start)
            for kind, data in held.items():
                part = data[start - first : stop - first]
                dtype = dtype_name(part.dtype)
                made.append(Piece(f"{kind}/{slot.name}", slot.shape, dtype, *span, part))
        return made

    def _within(self, first: int, last: int) -> list[tuple[Slot, int, int]]:
        """Parameters in a stretch of the flat order, and where each is in it."""
        cut = [(s, max(s.start, first), min(s.stop, last)) for s in self.flat.slots]
        return [(slot, start, stop) for slot, start, stop in cut if start < stop]

    def _kept_as(self, kind: str) -> str:
        """Where weights are their own masters, a checkpoint has them as weights."""
        return "param" if kind == "master" and self.flat.weights.dtype == self.wide else kind


class SharedRun:
    """Such a job on one worker: a `ShardedTrainee` whose steps are the run's, with journal and
    checkpoints."""

    def __init__(self, run: ElasticRun) -> None:
        assert isinstance(run.trainer, SharedOut), "build_learner made it"
        self.run, self.learner = run, run.trainer

    def flats(self) -> dict[str, Flat]:
        """See `ShardedTrainee`."""
        return self.learner.flats()

    def shard(self) -> TrainState:
        """See `ShardedTrainee`."""
        return self.learner.shard()

    def load_shard(self, world: World, state: TrainState | None) -> None:
        """See `ShardedTrainee`."""
        self.learner.load_shard(world, state)
        share_facts(self.run, world)

    def step(self, world: World, stop: bool = False) -> StepEnd:
        """See `ShardedTrainee`."""
        return self.run.step(world, stop)


class StoredShares:
    """The run's own checkpoints as the store that `PeerMemory` falls back to. It only reads: the
    run writes them, after steps of its own choice."""

    def __init__(self, trainee: SharedRun) -> None:
        self._trainee = trainee
        self._open: Checkpoint | None = None

    def newest(self) -> Version | None:
        """See `ShardStore`. ValueError when it is of other text."""
        run = self._trainee.run
        found = self._open = run.checkpoints.find()
        if found is None:
            return None
        run.refuse_other_text(found)
        run.recall(found)
        return Version(step=found.step, samples=found.meta["samples"], shards=1)

    def read(self, version: Version, name: str, first: int, count: int) -> Tensor:
        """See `ShardStore`. FileNotFoundError if the version is not there (any more)."""
        if self._open is None or self._open.step != version.step:
            self.newest()
        if self._open is None or self._open.step != version.step:
            raise FileNotFoundError(f"there is no whole checkpoint of step {version.step}")
        return self._trainee.learner.read(self._open, name, first, count)

    def write(self, version: Version, world: World, state: TrainState) -> None:
        """Never called: `store_every` is 0."""
        raise AssertionError("the run writes its checkpoints")
