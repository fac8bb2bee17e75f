"""What a job will take: floating-point operations and bytes by count, activations by trying one
micro-batch here, seconds and memory in all by a rehearsal on the job's own workers. Behind
`--dry-run`, and the MFU of a run.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from models.config import ModelConfig
from train.combine_mesh import uneven
from train.communication.exchange import Exchange
from train.communication.transport import dense_bytes
from train.job import Job
from train.layout import FlatModel
from train.memory.plan import memory_rows
from train.model import Llama
from train.parallel.mesh_plan import plan
from train.precision import COMPUTE, master_dtype
from train.weights import Start, build_model, read_start

PROBE = 1024
"""Side of the square matrices whose product measures what the machine can do."""


CROWD = 4
"""Workers for each core from which on nobody is started to rehearse."""


@dataclass(frozen=True)
class Estimate:
    """Per worker, without what Python and torch take themselves.

    state_bytes: weights, masters, gradient and optimizer state, as sharding and pipeline divide
    them; activation_bytes: what one micro-batch keeps for its backward pass; step_s: of one
    optimizer step on all workers; other_s: of the whole run, but steps: starting and ending,
    checkpoints at a fixed interval, evaluations; how: where the seconds are from; sent_bytes: of a
    worker in a step after the warm-up, by the compressor's formula; dense_bytes: uncompressed; both
    0 where the state is divided; memory: what `[memory]` changes of that, or what a mesh needs and
    sends, in words; peak_bytes: the largest resident set of a worker in `rehearsed_steps` real
    steps, Python and torch included; both 0 where none was made.
    """

    parameters: int
    state_bytes: int
    activation_bytes: int
    step_s: float
    steps: int
    flops_per_token: float
    other_s: float
    how: str
    sent_bytes: float
    dense_bytes: int
    memory: Mapping[str, str] = field(default_factory=dict)
    peak_bytes: int = 0
    rehearsed_steps: int = 0

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return (self.step_s * self.steps + self.other_s) / 3600


def flops_per_token(config: ModelConfig, parameters: int, sequence_tokens: int) -> float:
    """Of one training token, forward and backward: six per weight that multiplies (Kaplan et al.
    2020), and causal attention's scores and sums over half a sequence on average."""
    looked_up = 0 if config.tied_head else config.vocab * config.hidden
    attention = 6 * config.layers * config.heads * config.head_dim * sequence_tokens
    return 6.0 * (parameters - looked_up) + attention


def active(job: Job, config: ModelConfig, parameters: int) -> int:
    """Weights of the whole model that one token sees: of experts only those that it is sent to."""
    table = job.model
    unseen = max(table.experts - table.experts_per_token, 0) if table.experts else 0
    return parameters - unseen * config.layers * 3 * config.ff * config.hidden


def peak_flops(dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of a large matrix product here, at its best."""
    a, b = (torch.ones(PROBE, PROBE, dtype=dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2.0 * PROBE**3 / best_s


def estimate(job: Job) -> Estimate:
    """Builds the job's model and tries one micro-batch of made-up tokens (of a mesh bytes are
    counted instead), and rehearses where the workers are this machine's. ValueError as the job's
    parts have it, WorkerFailed."""
    start = read_start(job)
    size = _size_of_part(job, start) if job.meshed else _size(job, start)
    here = job.workers.where in ("local", "elastic")
    if here and job.workers.count <= CROWD * (psutil.cpu_count() or 1):
        found = _rehearsed(job, start)
    else:
        found = _tried(job, start)
    return Estimate(
        size.parameters,
        size.state_bytes,
        size.activation_bytes,
        found.step_s,
        job.steps,
        flops_per_token(
            start.config, active(job, start.config, size.parameters), job.data.sequence_tokens
        ),
        found.other_s,
        found.how,
        size.sent,
        size.dense,
        size.rows,
        found.peak_bytes,
        found.steps,
    )


class _Size(NamedTuple):
    """As `Estimate` has it; rows: its `memory`."""

    parameters: int
    state_bytes: int
    activation_bytes: int
    rows: Mapping[str, str]
    sent: float = 0.0
    dense: int = 0


def _size(job: Job, start: Start) -> _Size:
    """By trying, and by ZeRO's table."""
    model = build_model(job, start)
    parameters = sum(p.numel() for p in model.parameters())
    wide = master_dtype(COMPUTE[job.precision.compute]).itemsize
    model.to(COMPUTE[job.precision.compute])
    activations = _kept_bytes(model, _made_up(job, start, _samples(job)))
    sums = _sums(job, model, moment_bytes(job, start, wide))
    state = state_bytes(job, start, parameters, sums.moments) + sums.memory
    rows = memory_rows(job, start.config, parameters)
    return _Size(parameters, state, activations, rows, sums.sent, sums.dense)


def _size_of_part(job: Job, start: Start) -> _Size:
    """By count. ValueError where the model cannot be shared out."""
    config = start.config
    for sentence in uneven(job, config.heads, config.kv_heads, config.ff):
        raise ValueError(sentence)
    from train.parallel.mesh_job import whole_shapes

    shapes = whole_shapes(job, config)
    parameters = sum(map(math.prod, shapes.values()))
    found = plan(job, config)
    return _Size(parameters, found.state_bytes, found.activation_bytes, found.rows)


def _samples(job: Job) -> int:
    """Of a micro-batch."""
    replicas = job.workers.count // job.mesh.replica_workers
    return min(job.micro_samples, -(-job.batch_samples // replicas))


def _made_up(job: Job, start: Start, samples: int) -> Tensor:
    shape = (samples, job.data.sequence_tokens + 1)
    return torch.arange(shape[0] * shape[1]).view(shape) % start.config.vocab


class _Trial(NamedTuple):
    """Seconds of a step and of all else, and how they are known; the rest as `Estimate` has it."""

    step_s: float
    other_s: float
    how: str
    peak_bytes: int = 0
    steps: int = 0


def _tried(job: Job, start: Start) -> _Trial:
    """By one micro-batch of the whole model."""
    model = build_model(job, start).to(COMPUTE[job.precision.compute])
    samples = _samples(job)
    tokens = _made_up(job, start, samples)
    portions = -(-job.batch_samples // (job.workers.count // job.mesh.replica_workers * samples))
    step_s = min(_micro_s(model, tokens) for _ in range(2)) * portions
    how = "From one micro-batch here, as if each worker had such a machine: updates, sums over "
    how += "workers, checkpoints and evaluations are not in it."
    return _Trial(step_s / job.mesh.replica_workers, 0.0, how)


class _Sums(NamedTuple):
    """Bytes of the optimizer's state and of what compression remembers; sent by a worker in a step,
    and uncompressed."""

    moments: int
    memory: int = 0
    sent: float = 0.0
    dense: int = 0


def _sums(job: Job, model: Llama, moments: int) -> _Sums:
    if job.sharding.stage or job.pipeline.stages:
        return _Sums(moments)
    flat, workers = FlatModel(model, COMPUTE[job.precision.compute]), job.workers.count
    exchange = Exchange(job, flat)
    if job.compression.kind != "none":  # which may have taken over a part of the optimizer
        moments = sum(tensor.nbytes for tensor in exchange.optimizer.tensors().values())
    dense = dense_bytes(flat.summed.nbytes, workers)
    return _Sums(moments, exchange.memory_bytes(workers), exchange.formula_bytes(workers), dense)


def _rehearsed(job: Job, start: Start) -> _Trial:
    """By the job's workers."""
    from train.rehearsal import rehearse

    found = rehearse(job, start)
    every, evaluations = job.resilience.every_steps, job.report.evaluate_every_steps
    written = 1 + (job.steps // every if every else 0)
    evaluated = 1 + (job.steps // evaluations if evaluations else 0)
    rows = max(job.report.evaluate_tokens // job.data.sequence_tokens, 1)
    other_s = found.start_s + written * found.checkpoint_s + evaluated * rows * found.row_s
    how = f"From steps of the job's {job.workers.count} workers on this machine"
    if job.resilience.mode in ("checkfreq", "gemini"):
        how += f"; what {job.resilience.mode} does beside them is not in it"
    return _Trial(found.step_s, other_s, f"{how}.", found.peak_bytes, found.steps)


def moment_bytes(job: Job, start: Start, wide: int) -> int:
    """Of the optimizer's state for the whole model; wide: bytes of one number."""
    with torch.device("meta"):
        shapes = [p.shape for p in Llama(start.config).parameters()]
    if job.optimizer.name == "adamw":
        return sum(2 * wide * shape.numel() for shape in shapes)
    return sum(wide * (sum(shape) if len(shape) > 1 else shape.numel()) for shape in shapes)


def state_bytes(job: Job, start: Start, parameters: int, moments: int) -> int:
    """Of a worker. Sharded: ZeRO's table (Rajbhandari et al. 2020, figure 1), gradients in the
    compute dtype, and Gemini's copies of shares: two versions of each while one is made. In a
    pipeline: of the largest stage, with Bamboo of the largest two that follow each other."""
    compute = COMPUTE[job.precision.compute]
    size, wide = compute.itemsize, master_dtype(compute).itemsize
    masters = 0 if size == wide else parameters * wide
    stage, share = job.sharding.stage, 1 / job.workers.count
    if job.pipeline.stages:
        share = job.pipeline.stages * share  # of those that have the same stage
        held = 2 * size * parameters + moments
        if job.workers.staleness is not None:
            held = _of_member(job, 2 * size * parameters, parameters * wide, moments, share)
        return round(held * _largest_stage(job, start))
    weights, gradient = size * parameters, (size if stage else wide) * parameters
    if job.workers.staleness is not None:
        return _of_member(job, weights + masters + gradient, wide * parameters, moments, share)
    if job.resilience.mode == "gemini":
        # Gradients are summed whole; a share lies in memory as it is trained on, and in copies.
        own = (parameters * wide + moments) * share
        return round(weights + wide * parameters + own * (1 + 2 * job.resilience.copies))
    kept = weights * (share if stage == 3 else 1) + gradient * (share if stage >= 2 else 1)
    return round(kept + (masters + moments) * (share if stage else 1))


def _of_member(job: Job, own: int, masters: int, moments: int, share: float) -> int:
    """HetPipe's: what a worker computes with; as a server, its share of masters and moments, and of
    waves that are not whole yet from all; with plain SGD its own waves, too."""
    assert job.workers.staleness is not None
    waiting = masters * (job.workers.staleness + 1)
    added = 0 if job.optimizer.name != "sgd" or job.optimizer.beta1 else waiting
    return round(own + (masters + moments) * share + waiting + added)


def _largest_stage(job: Job, start: Start) -> float:
    """Its share of the model's weights."""
    from train.parallel.pipeline_layout import cut_spans
    from train.parallel.pipeline_model import JobLayers
    from train.resilience.templates import Cutter

    costs = JobLayers(job, start).costs()
    if job.pipeline.cuts:
        spans = cut_spans(len(costs.state_bytes), job.pipeline.cuts)
    else:
        template = Cutter(costs).template(job.pipeline.stages, job.batch_samples)
        assert template is not None, "stages are at most as many as layers"
        spans = template.spans
    weights = [sum(costs.state_bytes[slice(*span)]) for span in spans]
    if job.resilience.mode == "bamboo":
        following = weights[1:] + weights[:1]
        weights = [own + next_ for own, next_ in zip(weights, following, strict=True)]
    return max(weights) / sum(costs.state_bytes)


def _kept_bytes(model: Llama, tokens: Tensor) -> int:
    """Of distinct tensors that a forward pass saves for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tokens)
    del loss
    return sum(kept.values())


def _micro_s(model: Llama, tokens: Tensor) -> float:
    started_s = time.perf_counter()
    model.loss(tokens).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started_s
