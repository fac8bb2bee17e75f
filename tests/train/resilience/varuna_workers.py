"""What members of a crew do in Varuna's tests."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.train.parallel import tiny
from tests.train.processes import die
from tests.train.resilience.bamboo_workers import training
from train.parallel.pipeline import Act
from train.parallel.pipeline_layers import LayeredModel
from train.parallel.pipeline_layout import Layout
from train.parallel.pipeline_trainer import PipelineTrainer
from train.resilience.layer_folder import LayerFolder
from train.resilience.varuna import VarunaTrainer, measure, measure_link
from train.resilience.varuna_simulator import Measured
from train.world import World


def resume(kept: dict[str, Any], world: World, layout: Layout, root: str, every: int) -> int:
    """A new form of the job, from the newest checkpoint; the step it begins at."""
    kept["deaths"], kept["asked"] = [], []

    def observe(act: Act) -> None:
        for death in kept["deaths"]:
            if (death.step, death.kind, death.micro) == (kept["trainer"].steps + 1, *act):
                die()

    def batches(first: int, count: int) -> tuple[Tensor, Tensor]:
        place = layout.place(world.rank)
        if place and place.position == 0:
            kept["asked"].append((kept["trainer"].steps, first, count))
        return tiny.batches(first, count)

    told = replace(training(observe), batches=batches)
    trainer = VarunaTrainer(told, layout, world.rank, LayerFolder(Path(root)), every)
    trainer.resume(world.rank)
    kept["trainer"] = trainer
    return trainer.steps


def asked(kept: dict[str, Any], world: World) -> list[tuple[int, int, int]]:
    return list(kept["asked"])


class Wait(torch.autograd.Function):
    """Passes on what it is given, after a time each way: a speed that no neighbour changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class Waiting(nn.Module):
    """A layer that waits, then does little."""

    def __init__(self, inner: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, x: Tensor) -> Tensor:
        waited: Tensor = Wait.apply(self.inner(x), self.seconds)
        return waited


def waiting_model(seconds: list[float]) -> LayeredModel:
    model = tiny.model(len(seconds))
    return replace(model, build=lambda n: Waiting(model.build(n), seconds[n]))


def calibrate(
    kept: dict[str, Any], world: World, seconds: list[float], micro_samples: int
) -> Measured:
    """Costs measured on rank 0, the link between 0 and 1."""
    latency_s, bytes_per_s = measure_link(world)
    told = replace(training(), model=waiting_model(seconds))
    return measure(told, micro_samples, latency_s, bytes_per_s)


def timed(
    kept: dict[str, Any], world: World, seconds: list[float], layout: Layout, steps: int
) -> list[float]:
    """Seconds of each step of waiting layers, the first left out."""
    trainer = PipelineTrainer(replace(training(), model=waiting_model(seconds)), layout, world.rank)
    taken = []
    for _ in range(steps + 1):
        world.barrier()
        started_s = time.perf_counter()
        trainer.step(world)
        taken.append(time.perf_counter() - started_s)
    return taken[1:]
