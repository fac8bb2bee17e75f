"""A job of `sanderling train` on one worker of those that come and go: a `Run`, a step at a time.

Each worker resumes from the newest checkpoint when it starts, so what all of them together lose is
no more than the steps since. While one of them lives, no checkpoint is read into the run.
"""

import time
from dataclasses import replace

import torch

from train.checkpoint.reader import Checkpoint
from train.checkpoints import Checkpoints
from train.folder import RunFolder, read_lines
from train.job import Job
from train.learner import Learner, Whole
from train.memory.learner import InLessMemory
from train.run import Run
from train.state import TrainState
from train.step import StepReport
from train.world import World


class ElasticRun(Run):
    """A job on one worker, a step at a time: a `Trainee` whose state has the run's own facts."""

    def __init__(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> None:
        super().__init__(job, folder, checkpoints)
        self._generation = -1
        self.stopped = False

    def state(self) -> TrainState:
        """The whole learner's, with the run's facts."""
        return replace(whole(self.trainer).state(), meta=self.facts())

    def load(self, state: TrainState) -> None:
        """The learner's, and what the run has spent."""
        whole(self.trainer).load(state)
        self.last = state.meta.get("last", {})
        self.spend(state.meta.get("trained_s", 0.0), state.meta.get("usd", 0.0))

    def spend(self, trained_s: float, usd: float) -> None:
        """What the run has taken until now, by somebody who knows."""
        self.spent = (trained_s, usd)
        self.journal.status = replace(self.journal.status, trained_s=trained_s, usd=usd)

    def recall(self, found: Checkpoint) -> None:
        """See `Run`."""
        super().recall(found)
        self.spend(*self.spent)

    def step(self, world: World, stop: bool = False) -> StepReport:
        """One step with all that follows it (journal, checkpoint, evaluation). Rank 0 also asks for
        an end where a person or the budget does; then `stopped` is true everywhere after it."""
        first = world.rank == 0
        if world.generation != self._generation:
            self.saving.leave()
            if first:
                self.spent = (self.journal.status.trained_s, self.journal.status.usd)
                self.begin(world)
                self._note_what_is_missing()
        self._generation = world.generation
        over = first and (self.folder.stop_asked or bool(self.journal.over_budget()))
        started_s = time.monotonic()
        report = self.trainer.step(world, stop or over)
        self._after(report, world)
        if not first:  # in case it is rank 0 next, who keeps the account
            self._pass(time.monotonic() - started_s, world)
        if report.stop:
            ending = torch.tensor([float(over)])
            world.broadcast(ending, 0)
            self.stopped = bool(ending)
        return report

    def _pass(self, taken_s: float, world: World) -> None:
        trained_s, usd = self.spent
        price = world.size * self.job.budget.usd_per_worker_h
        self.spend(trained_s + taken_s, usd + taken_s / 3600 * price)

    def _note_what_is_missing(self) -> None:
        """Who noted the steps may have been lost between the last one and its lines."""
        if not self.last or self.last["step"] != self.trainer.step_number:
            return
        report = StepReport(**self.last, stop=False, ids=[])  # type: ignore[arg-type]
        sampled = max((line["step"] for line in read_lines(self.folder.samples)), default=0)
        if sampled < report.step:
            self.note_samples(report)
        lines = self.folder.read_metrics()
        noted = max((line["step"] for line in lines if "loss" in line), default=0)
        if noted < report.step:
            self.journal.note(report)

    def ended(self) -> bool:
        """Whether no step is to follow."""
        return self.stopped or self.trainer.step_number >= self.job.steps

    def finish(self, world: World) -> None:
        """The last checkpoint, the evaluation and the exported model."""
        self._end(world)


def whole(learner: Learner) -> Whole | InLessMemory:
    """The learner of a run whose workers hold the whole state."""
    assert isinstance(learner, Whole | InLessMemory), "replicas are whole"
    return learner
