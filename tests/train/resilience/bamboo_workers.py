"""What members of a crew do in Bamboo's tests: train, die at a chosen act, go on."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.train.parallel import tiny
from tests.train.processes import die
from train.parallel.pipeline import Act, StageRun
from train.parallel.pipeline_channels import Channels
from train.parallel.pipeline_layers import AdamW
from train.parallel.pipeline_layout import Layout, Place
from train.parallel.pipeline_trainer import LayersLost, PipelineTrainer, Training
from train.resilience.bamboo import BambooTrainer
from train.resilience.layer_folder import LayerFolder
from train.world import World

SAMPLES = 12


class Death(NamedTuple):
    """Rank `rank` is killed in step `step` (counted from 1) before an act; "loss" instead of an
    act's kind: when it has told the loss; "update": after its update."""

    step: int
    rank: int
    kind: str
    micro: int = 0


def training(observe: Any = lambda act: None) -> Training:
    return Training(
        tiny.model(), tiny.batches, AdamW(lambda _: 0.01), 1 / (SAMPLES * tiny.TOKENS), observe
    )


class StaleTrainer(BambooTrainer):
    """The mutation: copies are made and never kept up to date."""

    def _gradients(self, world: World, place: Place, channels: Channels) -> dict[int, Tensor]:
        summed = super()._gradients(world, place, channels)
        own = self.layout.stage(place).layers
        return {n: g if n in own else torch.zeros_like(g) for n, g in summed.items()}


class LazyTrainer(BambooTrainer):
    """The mutation: nothing is computed redundantly before it is needed."""

    def _begin(self, place: Place) -> StageRun:
        run = super()._begin(place)
        run._redundant = lambda: False  # type: ignore[method-assign]
        return run


KINDS: dict[str, type[PipelineTrainer]] = {
    "bamboo": BambooTrainer,
    "stale": StaleTrainer,
    "lazy": LazyTrainer,
    "plain": PipelineTrainer,
}


def begin(kept: dict[str, Any], world: World, layout: Layout, kind: str = "bamboo") -> None:
    acts: list[Act] = []
    kept["deaths"], kept["acts"] = [], acts

    def observe(act: Act) -> None:
        acts.append(act)
        trainer = kept["trainer"]
        for death in kept["deaths"]:
            if (death.step, death.kind, death.micro) == (trainer.steps + 1, *act):
                die()

    kept["trainer"] = KINDS[kind](training(observe), layout, world.rank)


def steps(kept: dict[str, Any], world: World, until: int, deaths: list[Death]) -> list[float]:
    """Trains until step `until` is finished; all losses so far."""
    trainer = kept["trainer"]
    kept["deaths"] = [death for death in deaths if death.rank == world.rank]
    for death in kept["deaths"]:
        if death.kind in ("loss", "update"):
            _dies_in(trainer, death)
    while trainer.steps < until:
        trainer.step(world)
    return list(trainer.losses.values())


def _dies_in(trainer: PipelineTrainer, death: Death) -> None:
    apply = trainer._apply

    def dying(loss: float) -> None:
        if trainer.steps + 1 == death.step and death.kind == "loss":
            die()
        apply(loss)
        if trainer.steps == death.step:
            die()

    trainer._apply = dying  # type: ignore[method-assign]


def changed(kept: dict[str, Any], world: World, lost: frozenset[int]) -> int:
    """Goes on without the lost; how many forward passes of what was taken over were there."""
    trainer = kept["trainer"]
    before = len(trainer._run.parts) if trainer._run else 0
    trainer.changed(world, lost)
    parts = trainer._run.parts[before:] if trainer._run and before else []
    return sum(part.forwards for part in parts)


def refused(kept: dict[str, Any], world: World, lost: frozenset[int]) -> str:
    """What `changed` raises when it cannot go on."""
    try:
        kept["trainer"].changed(world, lost)
    except (LayersLost, ValueError) as error:
        return str(error)
    raise AssertionError("it went on")


def watch_opens(kept: dict[str, Any], world: World, root: str) -> None:
    """Counts from now on every file that this process opens under a folder, at the interpreter."""
    kept["opened"] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(root):
            kept["opened"].append(str(arguments[0]))

    sys.addaudithook(hook)


def opened(kept: dict[str, Any], world: World) -> int:
    return len(kept.get("opened", []))


def save(kept: dict[str, Any], world: World, root: str) -> None:
    """A checkpoint by layer of the last finished step."""
    trainer = kept["trainer"]
    place = trainer.layout.place(world.rank)
    folder = LayerFolder(Path(root))
    tensors: dict[str, Tensor] = {}
    for layer in trainer.layout.stage(place).layers:
        tensors |= trainer.held.tensors(layer)
    folder.write(trainer.steps, world.rank, tensors)
    world.barrier()
    if world.rank == 0:
        folder.commit(trainer.steps, trainer.samples, world.size)
    world.barrier()
