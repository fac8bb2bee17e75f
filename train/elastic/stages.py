"""A job in pipelines on workers that come and go (`pipeline.stages` with `resilience.mode` bamboo,
oobleck or varuna): a `Keeper` whose state lies in stages.

Bamboo and Oobleck go on without the lost from what the others hold; Varuna takes a new form from
the newest checkpoint, whoever is there. Where the first two cannot (neighbours lost together, a
loss while another was made good), they fall back to that, too, and say so.
"""

import torch

from train.elastic.facts import share_facts
from train.elastic.keeper import Fetched
from train.elastic.messages import Held, Plan, Version
from train.elastic.run import ElasticRun
from train.elastic.trainee import StepEnd
from train.parallel.pipeline_job import PipelineLearner
from train.parallel.pipeline_trainer import LayersLost
from train.resilience.bamboo import BambooTrainer
from train.resilience.oobleck import OobleckTrainer
from train.world import World


class PipelineKeeper:
    """One worker's. What it holds is told as a whole version of the step it is at: the layout says
    who has which layers."""

    def __init__(self, run: ElasticRun) -> None:
        assert isinstance(run.trainer, PipelineLearner), "build_learner made it"
        self.run, self.learner = run, run.trainer
        self._members: tuple[str, ...] = ()
        self._settled = 0  # the generation whose layout this worker has; 0: none
        self._plan: Plan | None = None
        self._said: tuple[str, ...] = ()

    def held(self) -> tuple[Held, ...]:
        """See `Keeper`."""
        version = Version(step=self.at(), samples=self.learner.samples, shards=1)
        return (Held(version=version, index=0),)

    def at(self) -> int:
        """See `Keeper`."""
        return self.learner.step_number

    def fetch(self, plan: Plan, world: World) -> Fetched:
        """See `Keeper`. All agree first on whether all have the layout of one generation."""
        settled, self._settled, self._plan = self._settled, 0, plan
        rows = world.all_gather(torch.tensor([settled]))
        in_place = settled > 0 and all(int(row) == settled for row in rows)
        if in_place:
            fetched = self._go_on(plan, world)
            if fetched is not None:
                return fetched
        return self._begin_again(plan, world)

    def _go_on(self, plan: Plan, world: World) -> Fetched | None:
        """Without the lost, from what the others hold; None where that cannot be."""
        trainer = self.learner.trainer
        if not isinstance(trainer, BambooTrainer | OobleckTrainer):
            return None
        lost = [rank for rank, name in enumerate(self._members) if name not in plan.ranks]
        try:
            trainer.changed(world, frozenset(lost))
        except LayersLost as error:
            self._said = (str(error),)
            return None
        self._take_note()
        return Fetched(local_bytes=self._held_bytes())

    def _begin_again(self, plan: Plan, world: World) -> Fetched:
        """In the form for whoever is there, from the newest checkpoint, or from the start."""
        most = max(int(row) for row in world.all_gather(torch.tensor([self.at()])))
        self.learner.enter(world)
        found = self.run.checkpoints.find()
        if found is not None:
            self.run.refuse_other_text(found)
            self.learner.restore(found)
            self.run.recall(found)
        lost, self._said = self._said, ()
        if most > self.at():
            since = f"the checkpoint of step {self.at()}" if found else "the first weights"
            lost += (f"steps {self.at() + 1} to {most} are made again from {since}",)
        return Fetched(store_bytes=self._held_bytes() if found else 0, lost=lost)

    def _held_bytes(self) -> int:
        held = self.learner.trainer.held
        return sum(t.nbytes for layer in held.modules for t in held.tensors(layer).values())

    def _take_note(self) -> None:
        """A step may have been ended with the peers who knew that it could be."""
        known = self.at() in self.learner.trainer.losses  # not the step of a checkpoint
        if known and self.run.last.get("step") != self.at():
            report = self.learner.last_report()
            self.run.last = {
                "step": report.step,
                "samples": report.samples,
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "learning_rate": report.learning_rate,
            }

    def settle(self, world: World) -> None:
        """See `Keeper`."""
        share_facts(self.run, world)
        world.barrier()
        assert self._plan is not None, "fetch comes first"
        self._members, self._settled = self._plan.ranks, self._plan.generation

    def step(self, world: World, stop: bool) -> StepEnd:
        """See `Keeper`. Before a new form of Varuna's, a checkpoint: no step is made twice for a
        change that was told in time."""
        report = self.run.step(world, stop)
        paused = report.stop and not self.run.ended()
        if paused and self.run.job.resilience.mode == "varuna":
            self.run.save_now(world)
        return report

    def protect(self, world: World) -> None:
        """Copies are kept up to date within the step."""
