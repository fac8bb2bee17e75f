"""One worker's run of a job, in any world: resume, step, checkpoint, evaluate, end.

When a `WorldChanged` comes out of `run`, its caller may call it again with the next world: the
trainer in memory is as after the last finished step.
"""

import math
import time
from functools import partial
from typing import Any, Literal

import torch

from train.checkpoint.piece import Piece
from train.checkpoint.reader import Checkpoint
from train.checkpoints import Checkpoints
from train.data.corpus import Corpus, evaluation_batches, open_corpus
from train.data.stream import SampleStream
from train.export import export
from train.folder import RunFolder
from train.job import Job
from train.journal import Journal
from train.learner import Learner, build_learner
from train.saving import Saving
from train.step import StepReport
from train.weights import Start, read_start
from train.world import LocalWorld, World

Ending = Literal["finished", "stopped", "out of budget"]


class Run:
    """A job on one worker."""

    def __init__(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> None:
        """Builds the model; the corpus must be in the folder. ValueError as the parts have it."""
        self.job, self.folder, self.checkpoints = job, folder, checkpoints
        self.start: Start = read_start(job)
        self.corpus: Corpus = open_corpus(folder.corpus)
        stream = SampleStream(self.corpus.train, job.data.sequence_tokens, job.run.seed)
        self.trainer: Learner = build_learner(job, self.start, stream, folder)
        self.stream = stream
        self.journal = Journal(job, folder, self.start.config, self.trainer.parameters)
        self.saving = Saving(job.resilience, checkpoints, folder.log / "checkpoints.jsonl")
        self.trainer.before_update = self.saving.before_update
        self.evaluated_step = -1
        self.last: dict[str, float] = {}  # what the last finished step came to, if there was one
        self.spent = (0.0, 0.0)

    def resume(self, world: World | None = None) -> None:
        """Takes its place in a world (alone, where none is given) and loads the newest checkpoint,
        where there is one. ValueError when it is of other data or another model."""
        self.trainer.enter(world or LocalWorld())
        found = self.checkpoints.find()
        if found is not None:
            self.refuse_other_text(found)
            self.trainer.restore(found)
            self.recall(found)

    def refuse_other_text(self, found: Checkpoint) -> None:
        """ValueError for a checkpoint that was trained on another corpus."""
        if found.meta["meta"].get("corpus") != self.corpus.fingerprint:
            raise ValueError(
                f"{self.folder.path}: the checkpoint was trained on other text than data.sources "
                "gives now; give the old text, or --fresh to start over."
            )

    def recall(self, found: Checkpoint) -> None:
        """What a checkpoint tells of the run beside the learner's state."""
        meta = found.meta["meta"]
        self.saving.saved_step = found.step
        self.spent = (meta.get("trained_s", 0.0), meta.get("usd", 0.0))

    def run(self, world: World) -> Ending:
        """Trains until the job's end, its budget's, or somebody asks to stop. All workers of the
        world call it with equal trainers; all return the same."""
        first = world.rank == 0
        if first:
            self.begin(world)
        if self.job.model.start_from and not self.trainer.step_number and self.evaluated_step:
            self._evaluate(world)  # what the model knew before
        asked = False
        while self.trainer.step_number < self.job.steps and not asked:
            stop = first and (self.folder.stop_asked or bool(self.journal.over_budget()))
            report = self.trainer.step(world, stop)
            asked = report.stop
            self._after(report, world)
        return self._end(world)

    def facts(self) -> dict[str, Any]:
        """What is kept with a state beside the learner's tensors."""
        status = self.journal.status
        spent = {"trained_s": status.trained_s, "usd": status.usd}
        told = {"corpus": self.corpus.fingerprint, **spent, "last": self.last}
        return self.trainer.notes() | told

    def evaluate(self, world: World) -> float:
        """Bits per byte of the held-out text's beginning, shared out among the workers."""
        length = self.job.data.sequence_tokens
        tokens = self.job.report.evaluate_tokens
        batches = evaluation_batches(self.corpus, length, tokens)
        rows = [torch.from_numpy(batch.astype("int64"))[None] for batch in batches]
        if not rows:
            raise ValueError(
                f"data: the held-out text is shorter than data.sequence_tokens = {length}."
            )
        nats = self.trainer.nats(rows, world)
        tokens_per_byte = (len(self.corpus.held_out) - 1) / self.corpus.held_out_bytes
        return nats / (len(rows) * length) / math.log(2) * tokens_per_byte

    def _after(self, report: StepReport, world: World) -> None:
        told = ("step", "samples", "loss", "gradient_norm", "learning_rate")
        self.last = {name: getattr(report, name) for name in told}
        if world.rank == 0:
            self.note_samples(report)
            self.journal.note(report)
        started_s = time.monotonic()
        self.saving.after_step(report.step, partial(self.pieces, world), world)
        if _due(report.step, self.job.report.evaluate_every_steps):
            self._evaluate(world)
        if world.rank == 0:
            self.journal.rest(time.monotonic() - started_s)

    def begin(self, world: World) -> None:
        """By rank 0, before its first step in a world: what was noted of steps that will be made
        again is forgotten."""
        step = self.trainer.step_number
        self.journal.begin(step, *self.spent, world)
        self.folder.drop_samples_after(step)

    def note_samples(self, report: StepReport) -> None:
        """By rank 0: the samples that all workers have computed in a step, so that no worker's loss
        can take some of them with it."""
        if self.job.report.sample_ids:
            count = self.job.batch_samples
            self.folder.append_samples(report.step, self.stream.ids(report.samples - count, count))

    def save_now(self, world: World) -> None:
        """A checkpoint of the last finished step, whether one is due or not. Collective."""
        self.saving.save(self.trainer.step_number, partial(self.pieces, world), world)

    def pieces(self, world: World) -> tuple[dict[str, Any], list[Piece]]:
        """Meta and this worker's pieces of a checkpoint."""
        meta = {"samples": self.trainer.samples, "meta": self.facts()}
        return meta, self.trainer.pieces(world)

    def _end(self, world: World) -> Ending:
        """Rank 0 says what is left to be done: who has just come does not know what was."""
        step = self.trainer.step_number
        ending: Ending = "finished" if step >= self.job.steps else "stopped"
        over = world.rank == 0 and bool(self.journal.over_budget())
        unsaved = self.saving.saved_step != step or self.job.resilience.mode == "checkfreq"
        told = torch.tensor([over, unsaved, self.evaluated_step != step], dtype=torch.float32)
        world.broadcast(told, 0)
        if told[1]:
            self.saving.end(step, partial(self.pieces, world), world)
        if ending == "finished" and told[2]:
            self._evaluate(world)
        if ending == "stopped" and told[0]:
            ending = "out of budget"
        weights = self.trainer.exported(world)
        if world.rank == 0:
            chosen = self.job.model.experts_per_token if self.job.model.experts else 0
            export(self.folder.path, self.start, weights, chosen)
            reason = self.journal.over_budget() if ending == "out of budget" else ""
            self.journal.end(ending, reason)
        world.barrier()
        return ending

    def _evaluate(self, world: World) -> None:
        bits = self.evaluate(world)
        self.evaluated_step = self.trainer.step_number
        if world.rank == 0:
            self.journal.evaluated(bits)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
