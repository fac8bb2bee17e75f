"""What members of a crew do in Bamboo's tests: train, die at a chosen act, go on."""

from typing import Any, NamedTuple

from tests.train.crew import Crew, die
from tests.train.parallel import tiny
from train.parallel.pipeline import Act
from train.parallel.pipeline_layers import AdamW
from train.parallel.pipeline_layout import Layout
from train.parallel.pipeline_trainer import PipelineTrainer, Training
from train.resilience.bamboo import BambooTrainer
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
    """The mutation: copies are made and never updated."""

    def _apply(self, loss: float) -> None:
        assert self._summed is not None
        place = self.layout.place(self.rank)
        assert place is not None
        own = self.layout.stage(place).layers
        self._summed = {n: g if n in own else 0 * g for n, g in self._summed.items()}
        super()._apply(loss)

    rank = 0


class LazyTrainer(BambooTrainer):
    """The mutation: nothing is computed redundantly."""

    def _shadow(self, place: Any) -> Any:
        part = super()._shadow(place)
        if part is not None:
            part.forwards = part.forwards
        return part

    def _begin(self, place: Any) -> Any:
        run = super()._begin(place)
        run._redundant = lambda: False  # type: ignore[method-assign]
        return run


KINDS = {
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
    if kind == "stale":
        kept["trainer"].rank = world.rank


def steps(kept: dict[str, Any], world: World, until: int, deaths: list[Death]) -> list[float]:
    """Trains until step `until` is finished; all losses so far."""
    trainer = kept["trainer"]
    kept["deaths"] = [death for death in deaths if death.rank == world.rank]
    mark = {"loss": "_apply", "update": "agree"}
    for death in kept["deaths"]:
        if death.kind in mark:
            _dies_in(trainer, death)
    while trainer.steps < until:
        trainer.step(world)
    return losses(kept, world)


def _dies_in(trainer: PipelineTrainer, death: Death) -> None:
    apply = trainer._apply

    def dying(loss: float) -> None:
        if trainer.steps + 1 == death.step and death.kind == "loss":
            die()
        apply(loss)
        if trainer.steps == death.step:
            die()

    trainer._apply = dying  # type: ignore[method-assign]


def losses(kept: dict[str, Any], world: World) -> list[float]:
    return list(kept["trainer"].losses.values())


def changed(kept: dict[str, Any], world: World, lost: frozenset[int]) -> int:
    """Goes on without the lost; how many forward passes of what was taken over were there."""
    trainer = kept["trainer"]
    before = len(trainer._run.parts) if trainer._run else 0
    trainer.changed(world, lost)
    parts = trainer._run.parts[before:] if trainer._run and before else []
    kept["acts"].clear()
    return sum(part.forwards for part in parts)


def undisturbed(crew: Crew, layout: Layout, until: int, kind: str = "bamboo") -> list[float]:
    crew.values(begin, layout, kind)
    return crew.values(steps, until, [])[0]
