"""One worker's run of a job, in any world: resume, step, checkpoint, evaluate, end.

When a `WorldChanged` comes out of `run`, its caller may call it again with the next world: the
trainer in memory is as after the last finished step.
"""

import json
import math
import time
from dataclasses import replace
from typing import Literal

import torch

from train.checkpoints import Checkpoints
from train.data.corpus import Corpus, evaluation_batches, open_corpus
from train.data.stream import SampleStream, share
from train.export import export
from train.folder import RunFolder
from train.job import Job
from train.journal import Journal
from train.memory.trainers import RunTrainer, build_trainer
from train.state import TrainState
from train.step import StepReport
from train.weights import Start, read_start
from train.world import World

Ending = Literal["finished", "stopped", "out of budget"]


class Run:
    """A job on one worker."""

    def __init__(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> None:
        """Builds the model; the corpus must be in the folder. ValueError as the parts have it."""
        self.job, self.folder, self.checkpoints = job, folder, checkpoints
        self.start: Start = read_start(job)
        self.corpus: Corpus = open_corpus(folder.corpus)
        stream = SampleStream(self.corpus.train, job.data.sequence_tokens, job.run.seed)
        self.trainer: RunTrainer = build_trainer(job, folder, self.start, stream)
        parameters = sum(math.prod(slot.shape) for slot in self.trainer.flat.slots)
        self.journal = Journal(job, folder, self.start.config, parameters)
        self.saved_step = self.evaluated_step = -1
        self.last: dict[str, float] = {}  # what the last finished step came to, if there was one
        self._spent = (0.0, 0.0)

    def resume(self) -> None:
        """Loads the newest checkpoint, where there is one. ValueError when it is of other data."""
        state = self.checkpoints.newest()
        if state is None:
            return
        if state.meta.get("corpus") != self.corpus.fingerprint:
            raise ValueError(
                f"{self.folder.path}: the checkpoint was trained on other text than data.sources "
                "gives now; give the old text, or --fresh to start over."
            )
        self.trainer.load(state)
        self.saved_step = state.step
        self._spent = (state.meta.get("trained_s", 0.0), state.meta.get("usd", 0.0))

    def run(self, world: World) -> Ending:
        """Trains until the job's end, its budget's, or somebody asks to stop. All workers of the
        world call it with equal trainers; all return the same."""
        first = world.rank == 0
        if first:
            self.journal.begin(self.trainer.step_number, *self._spent, world)
        asked = False
        while self.trainer.step_number < self.job.steps and not asked:
            stop = first and (self.folder.stop_asked or bool(self.journal.over_budget()))
            report = self.trainer.step(world, stop)
            asked = report.stop
            self._after(report, world)
        return self._end(world)

    def state(self) -> TrainState:
        """What a checkpoint keeps."""
        state, status = self.trainer.state(), self.journal.status
        meta = {"corpus": self.corpus.fingerprint, "trained_s": status.trained_s, "usd": status.usd}
        return replace(state, meta=state.meta | meta | {"last": self.last})

    def evaluate(self, world: World) -> float:
        """Bits per byte of the held-out text's beginning, shared out among the workers."""
        length = self.job.data.sequence_tokens
        tokens = self.job.report.evaluate_tokens
        batches = list(evaluation_batches(self.corpus, length, tokens))
        mine = share(0, len(batches), world.rank, world.size)
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches[mine.first : mine.first + mine.samples]:
                row = torch.from_numpy(batch.astype("int64"))[None]
                nats = float(self.trainer.model.loss(row))
                sums += torch.tensor([nats, length], dtype=torch.float64)
        world.all_reduce(sums)
        if not float(sums[1]):
            raise ValueError(
                f"data: the held-out text is shorter than data.sequence_tokens = {length}."
            )
        tokens_per_byte = (len(self.corpus.held_out) - 1) / self.corpus.held_out_bytes
        return float(sums[0] / sums[1]) / math.log(2) * tokens_per_byte

    def _after(self, report: StepReport, world: World) -> None:
        told = ("step", "samples", "loss", "gradient_norm", "learning_rate")
        self.last = {name: getattr(report, name) for name in told}
        if world.rank == 0:
            self.journal.note(report)
        if self.job.report.sample_ids:
            self._log_samples(report, world)
        started_s = time.monotonic()
        if _due(report.step, self.job.resilience.checkpoint_every_steps):
            self._save(world)
        if _due(report.step, self.job.report.evaluate_every_steps):
            self._evaluate(world)
        if world.rank == 0:
            self.journal.rest(time.monotonic() - started_s)

    def _end(self, world: World) -> Ending:
        ending: Ending = "finished" if self.trainer.step_number >= self.job.steps else "stopped"
        if self.saved_step != self.trainer.step_number:
            self._save(world)
        if ending == "finished" and self.evaluated_step != self.trainer.step_number:
            self._evaluate(world)
        over = torch.tensor([float(bool(world.rank == 0 and self.journal.over_budget()))])
        world.broadcast(over, 0)
        if ending == "stopped" and float(over):
            ending = "out of budget"
        if world.rank == 0:
            export(self.folder.path, self.start, self.exported())
            reason = self.journal.over_budget() if ending == "out of budget" else ""
            self.journal.end(ending, reason)
        world.barrier()
        return ending

    def exported(self) -> dict[str, torch.Tensor]:
        """The weights as the run's folder keeps them: as computed with."""
        return self.trainer.flat.named(self.trainer.flat.weights)

    def _save(self, world: World) -> None:
        self.checkpoints.save(self.state(), world)
        self.saved_step = self.trainer.step_number

    def _evaluate(self, world: World) -> None:
        bits = self.evaluate(world)
        self.evaluated_step = self.trainer.step_number
        if world.rank == 0:
            self.journal.evaluated(bits)

    def _log_samples(self, report: StepReport, world: World) -> None:
        line = {"step": report.step, "rank": world.rank, "ids": report.ids}
        path = self.folder.log / f"samples-{world.rank}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
