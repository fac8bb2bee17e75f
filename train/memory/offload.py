"""ZeRO-Offload (Ren et al. 2021): a device has weights and activations; gradients go to the host as
they are made, where masters and moments are and the CPU computes AdamW.

From `memory.late_from_step` on, a step's update is computed beside the next step's passes, which
therefore use weights that lack it (the paper's one-step delayed parameter update): step t + 1 gives
AdamW the gradient at weights t - 1, when masters are at t. The job's last update is not late.
"""

import threading
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn

from train.communication.exchange import Exchange
from train.data.stream import SampleStream, share
from train.job import Job, OptimizerTable
from train.layout import EXTRA, FlatModel, Slot, slots_of
from train.memory.arena import Arena, Host
from train.model import Llama
from train.optimizer import AdamW, clip
from train.precision import COMPUTE, master_dtype
from train.schedule import factor
from train.state import TrainState
from train.step import StepReport, Trainer, refuse_infinite
from train.weights import Start, first_values
from train.world import World

Interval = tuple[float, float]
"""Begin and end, in seconds of time.monotonic()."""
SPANS = 64
"""How many of the last late updates, and of passes, are remembered."""
PENDING = "pending"
"""Kind of a gradient whose update is still to come, in a state."""


class HostFlat(FlatModel):
    """A `FlatModel` whose weights are always a copy of the masters, which are the host's."""

    def __init__(self, job: Job, start: Start, host: Host, arena: Arena) -> None:
        compute = COMPUTE[job.precision.compute]
        wide = master_dtype(compute)
        with torch.device("meta"):
            self.model = self.llama = model = Llama(start.config)
        parameters = dict(model.named_parameters())
        self.slots, self.arena = tuple(slots_of(parameters)), arena
        elements = self.slots[-1].stop
        self.decayed = sum(slot.stop - slot.start for slot in self.slots if len(slot.shape) > 1)
        self.masters = host.zeros("master", elements, wide)
        self.summed = host.zeros("gradient", elements + EXTRA, wide)
        self.gradient = self.summed[:elements]
        self.weights = torch.empty(elements, dtype=compute)
        arena.hold("weights", self.weights.nbytes)
        fill = first_values(job, start)
        with torch.no_grad():
            for slot in self.slots:
                fill(slot.name, self.view(self.masters, slot))
        for slot in self.slots:
            self._place(model, slot)
        model.tie()
        self.publish()

    def publish(self) -> None:
        """Sends the weights to the device."""
        self.weights.copy_(self.masters)
        self.arena.to_device_bytes += self.weights.nbytes

    def _place(self, model: Llama, slot: Slot) -> None:
        parent, _, leaf = slot.name.rpartition(".")
        parameter = nn.Parameter(self.view(self.weights, slot))
        model.get_submodule(parent).register_parameter(leaf, parameter)
        place, arena = self.view(self.gradient, slot), self.arena

        def leave(given: Tensor) -> None:
            """The device has a gradient only until the host has it."""
            assert given.grad is not None
            arena.hold("gradient", given.grad.nbytes)
            place.add_(given.grad)
            arena.to_host_bytes += given.grad.nbytes
            given.grad = None
            arena.hold("gradient", 0)

        parameter.register_post_accumulate_grad_hook(leave)  # type: ignore[no-untyped-call]


class HostAdamW(AdamW):
    """AdamW whose moments are the host's."""

    def __init__(self, flat: FlatModel, table: OptimizerTable, host: Host) -> None:
        self.flat, self.table = flat, table
        count, dtype = flat.masters.numel(), flat.masters.dtype
        self.exp_avg = host.zeros("exp_avg", count, dtype)
        self.exp_avg_sq = host.zeros("exp_avg_sq", count, dtype)

    def update_with(self, gradient: Tensor, step: int, learning_rate: float) -> None:
        """As `update`, with a gradient other than the flat one."""
        flat = self.flat
        own, flat.gradient = flat.gradient, gradient
        try:
            self.update(step, learning_rate)
        finally:
            flat.gradient = own


class Late:
    """An update on its way, in a thread. started_s, ended_s: of time.monotonic()."""

    def __init__(self, optimizer: HostAdamW, gradient: Tensor, step: int, rate: float) -> None:
        self.started_s = self.ended_s = time.monotonic()
        self._failure: BaseException | None = None

        def work() -> None:
            try:
                self.started_s = time.monotonic()
                optimizer.update_with(gradient, step, rate)
            except BaseException as error:  # told to whoever waits
                self._failure = error
            self.ended_s = time.monotonic()

        self._thread = threading.Thread(target=work, name="late update")
        self._thread.start()

    def wait(self) -> None:
        """Until the masters are new."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class OffloadTrainer(Trainer):
    """As `Trainer`, with two tiers. folder: of the host's files, or None for plain memory."""

    def __init__(self, job: Job, start: Start, stream: SampleStream, folder: Path | None) -> None:
        self.job, self.stream = job, stream
        self.arena, self.host = Arena(), Host(folder)
        self.flat = flat = HostFlat(job, start, self.host, self.arena)
        self.model = flat.llama
        self.optimizer: HostAdamW = HostAdamW(flat, job.optimizer, self.host)
        self.exchange = Exchange(job, flat, self.optimizer)
        self.before_update = lambda: None
        self.pending: Tensor | None = None
        if job.memory.late_from_step:
            self.pending = self.host.zeros(PENDING, flat.masters.numel(), flat.masters.dtype)
        self.waiting = False  # whether `pending` holds a gradient whose update is to come
        self.step_number = self.samples = 0
        self.late_spans: deque[Interval] = deque(maxlen=SPANS)
        self.pass_spans: deque[Interval] = deque(maxlen=SPANS)

    def step(self, world: World, stop: bool = False) -> StepReport:
        """See `Trainer.step`. A late update changes the state beside the passes."""
        self.before_update()
        late = self._begin_late()
        try:
            summed = self._gradient(world, stop)
        finally:
            if late is not None:
                late.wait()
                self.late_spans.append((late.started_s, late.ended_s))
        norm = clip(self.flat.gradient, self.job.optimizer.clip_norm)
        number = self.step_number + 1
        refuse_infinite(norm, number, self.job)
        delayed = self.job.memory.late_from_step
        self.waiting = bool(delayed) and delayed <= number < self.job.steps
        if self.waiting:
            assert self.pending is not None
            self.pending.copy_(self.flat.gradient)
        else:
            self.optimizer.update(number, self._rate(number))
        self.flat.publish()
        mine = share(self.samples, self.job.batch_samples, world.rank, world.size)
        ids = self.stream.ids(mine.first, mine.samples)
        self.step_number, self.samples = number, self.samples + self.job.batch_samples
        loss, asked = float(summed[-2]), bool(summed[-1])
        return StepReport(number, self.samples, loss, norm, self._rate(number), asked, ids)

    def state(self) -> TrainState:
        """See `Trainer.state`. Where weights are as wide as masters, only one of them is kept, so
        that a run may go on without offloading; a gradient that waits is kept, too."""
        named = self.flat.named
        same = self.flat.weights.dtype == self.flat.masters.dtype
        kinds = {"param": self.flat.masters if same else self.flat.weights}
        if not same:
            kinds["master"] = self.flat.masters
        if self.waiting and self.pending is not None:
            kinds[PENDING] = self.pending
        tensors = {f"{k}/{name}": t for k, flat in kinds.items() for name, t in named(flat).items()}
        return TrainState(self.step_number, self.samples, tensors | self.optimizer.tensors())

    def load(self, state: TrainState) -> None:
        """See `Trainer.load`."""
        held = any(name.startswith(f"{PENDING}/") for name in state.tensors)
        if held and self.pending is None:
            raise ValueError(
                "the state has a gradient whose update is still to come: memory.late_from_step "
                "must be given, as when it was written"
            )
        self.waiting = held
        super().load(state)
        self.flat.publish()

    def _rate(self, number: int) -> float:
        rate = self.job.optimizer.learning_rate
        return rate * factor(self.job.schedule, number - 1, self.job.steps)

    def _begin_late(self) -> Late | None:
        if not self.waiting:
            return None
        assert self.pending is not None
        return Late(self.optimizer, self.pending, self.step_number, self._rate(self.step_number))

    def _gradient(self, world: World, stop: bool) -> Tensor:
        """The sums over all workers: gradient, loss, votes."""
        started_s = time.monotonic()
        mine = share(self.samples, self.job.batch_samples, world.rank, world.size)
        summed, last = self.flat.summed, mine.first + mine.samples
        self.flat.clear_gradient()
        for first in range(mine.first, last, self.job.micro_samples):
            batch = self.stream.batch(first, min(self.job.micro_samples, last - first))
            loss = self.model.loss(batch) / self.job.run.batch_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            summed[-2] += loss.detach()
        self.pass_spans.append((started_s, time.monotonic()))
        summed[-1] = float(stop)
        world.all_reduce(summed)
        return summed
