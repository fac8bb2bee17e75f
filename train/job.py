"""What a person asks for: one TOML file, every field with a default that works.

Read by `sanderling train`. Unknown keys and values that are not accepted are refused in a sentence
that names them. Imports no torch.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.reading import Strict, read_toml, validated
from train.combine import refused
from train.shapes import MeshTable, ModelTable
from train.tables import CommunicationTable, CompressionTable, MemoryTable

KNOWN_SOURCES = ("brown", "python")
Share = Annotated[float, Field(ge=0, le=1)]


class DataTable(Strict):
    """The texts, in the order given, each document whole."""

    sources: tuple[str, ...] = Field(
        ("brown",),
        min_length=1,
        description="brown, python, text files or folders of them (*.txt, *.md, *.rst, *.py).",
    )
    sequence_tokens: int = Field(
        256, ge=8, le=1 << 17, description="Tokens that a training sample predicts."
    )
    held_out_every: int = Field(
        20, ge=2, description="Every so manieth document is held out for evaluation."
    )


class RunTable(Strict):
    """How much, and in what portions; the same for any number of workers."""

    tokens: int = Field(2_000_000, ge=1, description="Training tokens in all, epochs counted.")
    batch_tokens: int = Field(2048, ge=1, description="Tokens of one optimizer step.")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="Tokens that a worker computes at once; bounds its memory."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of weights and of the samples' order.")
    deterministic: bool = Field(True, description="Same workers, same bits; refuses what is not.")


class OptimizerTable(Strict):
    """AdamW (Loshchilov and Hutter 2019); in less memory Adafactor (Shazeer and Stern 2018); or
    momentum SGD."""

    name: Literal["adamw", "adafactor", "sgd"] = Field("adamw", description="The update rule.")
    learning_rate: float = Field(3e-3, gt=0, le=10, description="At its highest.")
    weight_decay: float = Field(0.1, ge=0, le=1, description="Of matrices; norms have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment (adamw, sgd).")
    beta2: float = Field(0.95, gt=0, lt=1, description="Decay of the second moment (adamw).")
    epsilon: float = Field(
        1e-8, gt=0, description="Added to the root of the second moment (adamw)."
    )
    clip_norm: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: any.")


class ScheduleTable(Strict):
    """The learning rate over the run, as shares of its steps."""

    name: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="cosine, warmup-stable-decay, or constant after the warm-up."
    )
    warmup: Share = Field(0.05, description="Share of steps in which it rises.")
    decay: Share = Field(0.2, description="Share of steps in which it falls (wsd).")
    final: Share = Field(0.1, description="What is left of it at the end.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name == "wsd" and self.warmup + self.decay > 1:
            raise ValueError("warmup and decay together must be at most 1")
        return self


class PrecisionTable(Strict):
    """What is computed in; masters and moments are float32 at least."""

    compute: Literal["float32", "bfloat16", "float64"] = Field(
        "bfloat16", description="Of weights and activations; bfloat16 keeps float32 masters."
    )


class WorkersTable(Strict):
    """Who computes."""

    count: int = Field(2, ge=1, le=1024, description="Worker processes at the start.")
    least: int = Field(
        1, ge=1, le=1024, description="Elastic: fewest that it goes on with; up to count."
    )
    threads: int = Field(0, ge=0, le=1024, description="Of each; 0: cores / workers, at least 1.")
    where: str = Field(
        "local", description="local; elastic: who dies is replaced; ray: the same as Ray actors."
    )
    shares: Literal["equal", "measured"] = Field(
        "equal", description="Of a step's samples: to all alike, or by measured speed."
    )
    staleness: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="HetPipe: steps that a worker may be ahead of the others; none: all together.",
    )


class ShardingTable(Strict):
    """What of the state each worker keeps (ZeRO's stages)."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0 all of it, 1 its share of moments, 2 also gradients, 3 also weights."
    )


class PipelineTable(Strict):
    """The model's layers divided among workers, in chains of stages side by side."""

    stages: int = Field(
        0,
        ge=0,
        le=1024,
        description="Workers of a chain (oobleck, varuna: fewest of one); 0: no pipeline.",
    )
    cuts: tuple[int, ...] = Field(
        (),
        description="Layers at which stages begin, the embedding being layer 0, as --advise finds "
        "them; empty: by the layers' costs.",
    )

    @model_validator(mode="after")
    def _follow(self) -> Self:
        if not self.cuts:
            return self
        said = f"cuts = {list(self.cuts)}"
        if len(self.cuts) != self.stages:
            raise ValueError(
                f"{said} begin {len(self.cuts)} stages, but stages = {self.stages}: one layer for "
                "each stage is accepted, and an empty list"
            )
        if self.cuts[0] or any(a >= b for a, b in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ValueError(f"{said} must begin with 0 and rise, so that no stage is empty")
        return self


class ResilienceTable(Strict):
    """What a loss costs. train/README.md says what each mode needs beside it."""

    mode: Literal["none", "checkpoint", "checkfreq", "gemini", "bamboo", "oobleck", "varuna"] = (
        Field("checkpoint", description="What is done against losses (train/resilience).")
    )
    checkpoints: str = Field(
        "", description="Folder or s3://bucket/prefix to keep them at; empty: the run's folder."
    )
    checkpoint_every_steps: int = Field(
        50,
        ge=0,
        description="0: only at the end and when stopped, as with mode none; checkfreq measures.",
    )
    keep: int = Field(2, ge=1, le=1000, description="Checkpoints kept, newest first.")
    slowdown: float = Field(
        0.035, gt=0, le=1, description="Share of time that checkpoints may cost (checkfreq)."
    )
    copies: int = Field(
        2, ge=2, le=1024, description="Workers that hold each share, its owner included (gemini)."
    )
    failures: int = Field(
        1, ge=1, le=1023, description="Losses at once that pipelines must survive (oobleck)."
    )

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints at a fixed interval; 0: none on the way."""
        return 0 if self.mode in ("none", "checkfreq") else self.checkpoint_every_steps


class BudgetTable(Strict):
    """When to stop early; the run then has a checkpoint and can go on with a larger budget."""

    hours: float | None = Field(None, gt=0, description="Hours of training, restarts added up.")
    usd: float | None = Field(None, gt=0, description="Dollars; needs usd_per_worker_h.")
    usd_per_worker_h: float = Field(0.0, ge=0, description="What a worker's hour costs.")

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.usd is not None and not self.usd_per_worker_h:
            raise ValueError("usd needs usd_per_worker_h, the price of a worker's hour")
        return self


class ReportTable(Strict):
    """What is written down on the way."""

    every_steps: int = Field(1, ge=1, description="Steps between two lines of metrics.jsonl.")
    evaluate_every_steps: int = Field(0, ge=0, description="0: only at the end.")
    evaluate_tokens: int = Field(65_536, ge=1, description="Held-out tokens of an evaluation.")
    tensorboard: bool = Field(
        False, description="Also TensorBoard's files (pip install sanderling[tensorboard])."
    )
    sample_ids: bool = Field(
        False, description="Also the ids of the samples of each step (log/samples.jsonl)."
    )


class Job(Strict):
    """A whole job. name: the run's folder below `folder`."""

    name: str = Field("brown", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    folder: Path = Field(
        Path("runs"), description="Where runs are kept; relative to the job's file."
    )
    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    run: RunTable = RunTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    precision: PrecisionTable = PrecisionTable()
    workers: WorkersTable = WorkersTable()
    sharding: ShardingTable = ShardingTable()
    pipeline: PipelineTable = PipelineTable()
    mesh: MeshTable = MeshTable()
    compression: CompressionTable = CompressionTable()
    communication: CommunicationTable = CommunicationTable()
    memory: MemoryTable = MemoryTable()
    resilience: ResilienceTable = ResilienceTable()
    budget: BudgetTable = BudgetTable()
    report: ReportTable = ReportTable()

    @model_validator(mode="after")
    def _portions(self) -> Self:
        sequence, batch = self.data.sequence_tokens, self.run.batch_tokens
        if batch % sequence:
            raise ValueError(
                f"run.batch_tokens = {batch} must be a multiple of "
                f"data.sequence_tokens = {sequence}"
            )
        if self.run.micro_batch_tokens < sequence:
            raise ValueError(
                f"run.micro_batch_tokens = {self.run.micro_batch_tokens} must be at least "
                f"data.sequence_tokens = {sequence}"
            )
        for sentence in refused(self):
            raise ValueError(sentence)
        return self

    @property
    def batch_samples(self) -> int:
        """Samples of one optimizer step, over all workers."""
        return self.run.batch_tokens // self.data.sequence_tokens

    @property
    def micro_samples(self) -> int:
        """Samples that a worker computes at once."""
        return self.run.micro_batch_tokens // self.data.sequence_tokens

    @property
    def meshed(self) -> bool:
        """Whether its workers are a mesh's: a replica, a matrix or a mixture over several."""
        return bool(self.model.experts) or not self.mesh.plain

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; the last one is a full batch, too."""
        return math.ceil(self.run.tokens / self.run.batch_tokens)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / self.name


def checked(job: Job) -> Job:
    """A job whose tables were replaced, once more. ValueError as for a file."""
    for sentence in refused(job):
        raise ValueError(sentence)
    return job


def read_job(path: Path) -> Job:
    """The job in a file. Its folder and file sources are relative to the file's own folder.
    ValueError with a sentence for each mistake."""
    job = validated(Job, read_toml(path), str(path))
    home = path.parent
    sources = tuple(
        source if source in KNOWN_SOURCES else str(home / source) for source in job.data.sources
    )
    data = job.data.model_copy(update={"sources": sources})
    place = str(home / job.memory.folder) if job.memory.folder else ""
    memory = job.memory.model_copy(update={"folder": place})
    return job.model_copy(update={"folder": home / job.folder, "data": data, "memory": memory})
