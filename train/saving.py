"""When a run's states are kept: every so many steps while all wait, or beside training within a
budget of slowdown (`resilience.mode = "checkfreq"`)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.background import BackgroundCheckpoints
from train.checkpoint.piece import Piece
from train.checkpoints import Checkpoints
from train.job import ResilienceTable
from train.resilience.checkfreq import CheckFreq
from train.world import World

State = Callable[[], tuple[dict[str, Any], Sequence[Piece]]]
"""Meta and this worker's pieces, live."""


class Saving:
    """One worker's; all of a world call it together. saved_step: of the newest that was begun.
    log: where rank 0 tells of each checkpoint that was written beside training."""

    def __init__(self, table: ResilienceTable, checkpoints: Checkpoints, log: Path) -> None:
        self.table, self.checkpoints, self.log = table, checkpoints, log
        self.saved_step = -1
        self._policy = CheckFreq(table.slowdown) if table.mode == "checkfreq" else None
        self._beside: BackgroundCheckpoints | None = None
        self._generation, self._told = -1, 0

    def before_update(self) -> None:
        """Before a step changes the state: a copy that is being made of it has to be whole."""
        if self._beside is not None:
            self._beside.before_update()

    def after_step(self, step: int, state: State, world: World) -> None:
        """Keeps the state of this step, if it is due."""
        if self._policy is not None:
            beside = self._writer_in(world, self._policy)
            if beside.step_done(step, state):
                self.saved_step = step
            self._tell(beside, world)
        elif self.table.every_steps and step % self.table.every_steps == 0:
            self.save(step, state, world)

    def save(self, step: int, state: State, world: World) -> None:
        """Keeps this step's state now; everybody waits until it is durable."""
        self.checkpoints.write(step, *state(), world)
        self.saved_step = step

    def end(self, step: int, state: State, world: World) -> None:
        """The last state of a run, after which nothing is written."""
        if self._beside is not None and self._generation == world.generation:
            self._beside.finish()
            self._tell(self._beside, world)
        self.leave()
        self.save(step, state, world)

    def leave(self) -> None:
        """The world has changed: what is being written in it will not be whole."""
        if self._beside is not None:
            self._beside.close(abandon=True)
            self._beside = None

    def _writer_in(self, world: World, policy: CheckFreq) -> BackgroundCheckpoints:
        if self._beside is None or self._generation != world.generation:
            self.leave()
            self._generation, self._told = world.generation, 0

            def agree(value: int) -> int:
                told = torch.tensor([value])
                world.broadcast(told, 0)
                return int(told)

            writer = self.checkpoints.writer(world)
            self._beside = BackgroundCheckpoints(writer, world.rank, world.size, policy, agree)
        return self._beside

    def _tell(self, beside: BackgroundCheckpoints, world: World) -> None:
        """A line for each checkpoint that has ended."""
        ended, self._told = beside.outcomes[self._told :], len(beside.outcomes)
        if world.rank or not ended:
            return
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            for outcome in ended:
                line = {"step": outcome.step, "persist_s": outcome.persist_s}
                line["interval_steps"] = beside.policy.interval() if beside.policy.known else 0
                file.write(json.dumps(line | {"failure": outcome.reason}) + "\n")
