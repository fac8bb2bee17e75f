"""Job morphing (Varuna, EuroSys 22): when workers come or go, the job takes the form (P stages, D
chains) that is fastest for those there are, and every update keeps its number of samples.

State goes through checkpoints by layer, written every few steps by the chains in turns; whatever
the new form, each worker reads its own layers from the newest one. It costs the steps since then,
which are done again with the same samples.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from train.parallel.pipeline_layers import HeldLayers
from train.parallel.pipeline_layout import Layout
from train.parallel.pipeline_trainer import PipelineTrainer, Training
from train.resilience.layer_folder import LayerFolder
from train.resilience.varuna_simulator import Measured
from train.world import World


class VarunaTrainer(PipelineTrainer):
    """A worker of one form of the job; a new form is a new one, `resumed`. every: steps between
    checkpoints."""

    def __init__(
        self, training: Training, layout: Layout, rank: int, folder: LayerFolder, every: int
    ) -> None:
        super().__init__(training, layout, rank)
        self.folder, self.every = folder, every

    def resume(self, rank: int) -> None:
        """Takes its layers from the newest checkpoint, if there is one."""
        found = self.folder.newest()
        if found is None:
            return
        for layer in self.held.modules:
            names = self.held.tensors(layer)
            self.held.load(layer, found.read(names), found.step)
        self.steps, self.samples = found.step, found.samples

    def step(self, world: World) -> float:
        """See `PipelineTrainer.step`; then a checkpoint, if it is due."""
        loss = super().step(world)
        if self.steps % self.every == 0:
            self.save(world)
        return loss

    def save(self, world: World) -> None:
        """A checkpoint of the last finished step. Layer n is written by chain n mod D."""
        tensors: dict[str, Tensor] = {}
        place = self.layout.place(world.rank)
        if place is not None:
            for layer in self.layout.stage(place).layers:
                if layer % len(self.layout.chains) == place.chain:
                    tensors |= self.held.tensors(layer)
        self.folder.write(self.steps, world.rank, tensors)
        world.barrier()
        if world.rank == 0:
            self.folder.commit(self.steps, self.samples, world.size)


def measure(
    training: Training,
    micro_samples: int,
    latency_s: float,
    bytes_per_s: float,
    memory_bytes: float = float("inf"),
    repeats: int = 5,
) -> Measured:
    """The costs of every layer on this worker, medians of `repeats`, on layers built for it."""
    model = training.model
    held = HeldLayers(model, training.update)
    held.build(range(model.count))
    inputs, targets = training.batches(0, micro_samples)
    rows: list[list[tuple[float, float, float]]] = []
    entering = inputs
    for layer in range(model.count):
        is_last = layer == model.count - 1
        taken = []
        for _ in range(repeats + 1):
            taken.append(_time_layer(held, layer, entering, targets if is_last else None))
        rows.append(taken[1:])  # the first one warms up
        with torch.no_grad():
            entering = held.modules[layer](entering)
    each = [[statistics.median(times) for times in zip(*taken, strict=True)] for taken in rows]
    item = torch.empty(0, dtype=model.dtype).element_size()
    sizes = [held.numel(n) * item for n in range(model.count)]
    boundary = torch.Size(model.boundary(micro_samples)).numel() * item
    return Measured(
        tuple(row[0] for row in each),
        tuple(row[1] for row in each),
        tuple(row[2] for row in each),
        tuple(map(float, sizes)),
        tuple(3.0 * size for size in sizes),
        (float(boundary),) * model.count,
        latency_s,
        bytes_per_s,
        memory_bytes,
    )


def _time_layer(
    held: HeldLayers, layer: int, entering: Tensor, targets: Tensor | None
) -> tuple[float, float, float]:
    """Seconds forward, backward, update."""
    if entering.is_floating_point():
        entering = entering.detach().requires_grad_()
    started_s = time.perf_counter()
    value = held.modules[layer](entering)
    if targets is not None:
        value = held.model.loss(value, targets)
    forward_s = time.perf_counter()
    torch.autograd.backward([value], [torch.ones_like(value)])
    backward_s = time.perf_counter()
    held.apply(layer, held.gradient(layer), 0)
    return forward_s - started_s, backward_s - forward_s, time.perf_counter() - backward_s


def measure_link(world: World, size_bytes: int = 1 << 22, repeats: int = 9) -> tuple[float, float]:
    """Seconds of a small message and bytes/s of large ones between ranks 0 and 1, the same numbers
    on every rank. All ranks call it."""
    small = _round_trip_s(world, 8, repeats) / 2
    large = _round_trip_s(world, size_bytes, repeats) / 2
    told = torch.tensor([small, size_bytes / max(large - small, 1e-9)], dtype=torch.float64)
    world.broadcast(told, 0)
    return float(told[0]), float(told[1])


def _round_trip_s(world: World, size_bytes: int, repeats: int) -> float:
    tensor = torch.zeros(size_bytes // 8, dtype=torch.float64)
    turn: list[Callable[[Tensor, int], None]] = [world.send, world.recv]
    taken = []
    for _ in range(repeats):
        world.barrier()
        started_s = time.perf_counter()
        if world.rank < 2:
            first, second = turn if world.rank == 0 else reversed(turn)
            first(tensor, 1 - world.rank)
            second(tensor, 1 - world.rank)
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken)
