"""What `--dry-run` says of a mesh, by the formulas of `mesh_cost` and `mesh_moments`."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import ModelConfig
from train.job import Job
from train.parallel.mesh_cost import (
    MeshShape,
    activation_bytes,
    batch_of,
    sent_bytes,
    shape_of,
    state_bytes,
)
from train.parallel.mesh_moments import peak_bytes, working_bytes

MIB = 1 << 20


@dataclass(frozen=True)
class MeshPlan:
    """Bytes of a worker's tensors; rows: lines of `--dry-run`."""

    state_bytes: int
    activation_bytes: int
    rows: Mapping[str, str]


def plan(job: Job, config: ModelConfig) -> MeshPlan:
    """Of the worker that has most. The job's mesh must fit its model."""
    shape, compute = shape_of(job), job.precision.compute
    batch = batch_of(job, shape)
    state = state_bytes(config, shape, compute, moments_of(job)).total
    kept = activation_bytes(config, shape, batch, compute)
    working = working_bytes(config, shape, batch, compute)
    peak = peak_bytes(config, shape, batch, compute, moments_of(job))
    sent = sent_bytes(config, shape, batch, compute)
    to = {"replicas": sent.data, "of a sequence": sent.sequence, "of a matrix": sent.tensor}
    to["of a mixture"] = sent.experts
    told = ", ".join(f"{each / MIB:.1f} MiB {name}" for name, each in to.items() if each)
    rows = {
        "communication": f"{told} per worker and step" if told else "none: one worker",
        "mesh": _said(shape),
        "for a moment": f"{working.total / MIB:.1f} MiB more per worker, {working.when}",
        "memory, counted": f"{peak / MIB:.1f} MiB of tensors per worker at their most",
    }
    return MeshPlan(state, kept, rows)


def moments_of(job: Job) -> int:
    """Numbers that the optimizer keeps of each weight."""
    if job.optimizer.name == "adamw":
        return 2
    return int(job.optimizer.beta1 > 0)


def _said(shape: MeshShape) -> str:
    whole = f"{shape.replicas} replicas" if shape.replicas > 1 else "1 replica"
    share = ", which share their state" if shape.shared else ""
    if shape.mixture is not None and shape.mixture.sharers > 1:
        share = f", {shape.mixture.sharers} to a mixture of {shape.mixture.experts} experts"
    kind = "a ring" if shape.ring else "exchanged heads"
    parts = []
    if shape.tensor > 1:
        tokens = ", and tokens between them" if shape.sequence_parallel else ""
        parts.append(f"{shape.tensor} workers to a matrix{tokens}")
    if shape.sequence > 1:
        parts.append(f"{shape.sequence} to a sequence by {kind}")
    each = f", each of {' and '.join(parts)}" if parts else ""
    return f"{whole}{share}{each}"
