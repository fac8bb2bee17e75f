"""What members of a crew do in Oobleck's tests."""

from typing import Any

import torch

from tests.train.processes import die
from tests.train.resilience.bamboo_workers import SAMPLES, training
from train.parallel.pipeline import Act
from train.parallel.pipeline_layout import Layout
from train.parallel.pipeline_trainer import Move, PipelineTrainer
from train.resilience.oobleck import OobleckTrainer, first_layout
from train.resilience.templates import LayerCosts, Planner
from train.world import World

# Two workers are the fewest that hold the model; every layer but the first takes as long.
COSTS = LayerCosts((0.2, *(1.0,) * 7), (1.0,) * 8, (0.1,) * 8, 5.0)
PLANNER = Planner(COSTS, micros=6)
MICRO_SAMPLES = SAMPLES // 6


class ForgetfulTrainer(OobleckTrainer):
    """The mutation: layers that are missing are made anew instead of fetched."""

    def transfer(self, world: World, moves: list[Move]) -> None:
        self.held.build([move.layer for move in moves if move.to == world.rank])


def begin(kept: dict[str, Any], world: World, forgetful: bool = False) -> list[int]:
    """Starts as the planner says; how many workers each pipeline has."""
    kept["deaths"] = []

    def observe(act: Act) -> None:
        for death in kept["deaths"]:
            if (death.step, death.kind, death.micro) == (kept["trainer"].steps + 1, *act):
                die()

    layout = first_layout(PLANNER, world.size, SAMPLES, MICRO_SAMPLES)
    kind = ForgetfulTrainer if forgetful else OobleckTrainer
    kept["trainer"] = kind(training(observe), PLANNER, layout, world.rank)
    return [len(chain.stages) for chain in layout.chains]


def changed(kept: dict[str, Any], world: World, lost: frozenset[int]) -> dict[str, Any]:
    """Goes on without the lost; the new layout, bytes sent for it, and all state held then."""
    trainer = kept["trainer"]
    before = trainer.sent_bytes
    trainer.changed(world, lost)
    return {
        "layout": trainer.layout,
        "bytes": trainer.sent_bytes - before,
        "steps": trainer.steps,
        "state": {n: trainer.held.flat(n).numpy() for n in trainer.held.modules},
    }


def fresh(
    kept: dict[str, Any], world: World, layout: Layout, at: int, state: dict[int, Any]
) -> None:
    """Starts in a given layout from a state after `at` steps."""
    kept["deaths"] = []
    trainer = PipelineTrainer(training(), layout, world.rank)
    for layer in list(trainer.held.modules):
        trainer.held.load_flat(layer, torch.tensor(state[layer]), at)
    trainer.steps, trainer.samples = at, at * SAMPLES
    kept["trainer"] = trainer
