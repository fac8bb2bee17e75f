"""Which settings of a job go together with its mesh (`train.combine` has the others).

Imports no torch, as `train.job` does not.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.job import Job


def refused_mesh(job: "Job") -> Iterator[str]:
    """What does not go with the job's mesh or its experts, or is not read."""
    table, count = job.mesh, job.workers.count
    yield from _unread(job)
    if not job.meshed:
        return
    asked = _asked_mesh(job)
    for setting, accepted in _beside_mesh(job):
        yield f"{asked} does not go with {setting}: {accepted} is accepted"
    if count % table.replica_workers:
        yield (
            f"workers.count = {count} must be a multiple of mesh.tensor x mesh.sequence = "
            f"{table.tensor} x {table.sequence}, so that replicas are whole"
        )
    yield from _experts(job)
    model = job.model
    if model.start_from:  # whose shape is not known yet
        yield from uneven(job)
    else:
        yield from uneven(job, model.heads, model.kv_heads, model.feed_forward)


def _unread(job: "Job") -> Iterator[str]:
    """Settings of a mesh that nothing reads."""
    table = job.mesh
    if table.sequence_parallel and table.tensor == 1:
        yield "mesh.sequence_parallel = true is read where mesh.tensor is 2 or more, but it is 1"
    if table.sequence_kind != "ring" and table.sequence == 1:
        yield (
            f'mesh.sequence_kind = "{table.sequence_kind}" is read where mesh.sequence is 2 or '
            "more, but it is 1"
        )
    if not job.model.experts and (table.expert > 1 or table.expert_travel != "tokens"):
        name = "expert" if table.expert > 1 else "expert_travel"
        yield (
            f"mesh.{name} = {_toml(getattr(table, name))} is read where model.experts is 2 or "
            "more, but it is 0"
        )


def _experts(job: "Job") -> Iterator[str]:
    """Of a model with experts."""
    table, experts = job.mesh, job.model.experts
    if not experts:
        return
    asked = f"model.experts = {experts}"
    if table.tensor > 1 or table.full_shard:
        instead = "mesh.tensor = 1" if table.tensor > 1 else "mesh.full_shard = false"
        yield f"{asked} are shared by mesh.expert and not split further: {instead} is accepted"
    if experts % table.expert:
        yield (
            f"mesh.expert = {table.expert} replicas cannot share {asked} evenly: a divisor of "
            f"{experts} is accepted"
        )
    replicas = job.workers.count // table.replica_workers
    if replicas % table.expert:
        yield (
            f"mesh.expert = {table.expert} must be a divisor of the {replicas} replicas that "
            f"workers.count = {job.workers.count} make"
        )
    if table.expert_travel != "tokens" and table.expert == 1:
        yield (
            f'mesh.expert_travel = "{table.expert_travel}" is read where mesh.expert is 2 or more, '
            "but it is 1"
        )
    if table.expert_travel == "auto" and job.run.deterministic:
        yield (
            'mesh.expert_travel = "auto" goes by the time that steps took: '
            "run.deterministic = false is accepted, or another way to travel"
        )


def _asked_mesh(job: "Job") -> str:
    """The first setting that makes a mesh of it."""
    table = job.mesh
    if job.model.experts:
        return f"model.experts = {job.model.experts}"
    for name in ("tensor", "sequence"):
        if getattr(table, name) > 1:
            return f"mesh.{name} = {getattr(table, name)}"
    return "mesh.full_shard = true"


def _beside_mesh(job: "Job") -> Iterator[tuple[str, str]]:
    """What a job says that does not go with a mesh, and what is accepted instead."""
    plain = (
        ("workers.where", job.workers.where, "local"),
        ("workers.shares", job.workers.shares, "equal"),
        ("pipeline.stages", job.pipeline.stages, 0),
        ("compression.kind", job.compression.kind, "none"),
        ("communication.overlap", job.communication.overlap, False),
        ("memory.activations", job.memory.activations, "keep"),
        ("memory.offload", job.memory.offload, "none"),
    )
    for name, value, accepted in plain:
        if value != accepted:
            yield f"{name} = {_toml(value)}", _toml(accepted)
    if job.sharding.stage:
        instead = "0 (mesh.full_shard = true shares the state of replicas)"
        yield f"sharding.stage = {job.sharding.stage}", instead
    named = job.optimizer.name
    if named == "adafactor" or (job.mesh.full_shard and named != "adamw"):
        wanted = '"adamw"' if job.mesh.full_shard else '"adamw" or "sgd"'
        yield f'optimizer.name = "{named}"', wanted


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | int) else f'"{value}"'


def uneven(job: "Job", heads: int = 0, kv_heads: int = 0, feed_forward: int = 0) -> Iterator[str]:
    """What a job's mesh cannot share out evenly. 0: not known, and not looked at."""
    table, tokens = job.mesh, job.data.sequence_tokens
    for name, number in (("kv_heads", kv_heads), ("feed_forward", feed_forward)):
        if number % table.tensor:
            yield (
                f"mesh.tensor = {table.tensor} workers cannot share model.{name} = {number} "
                f"evenly: a divisor of {number} is accepted"
            )
    asked = f"mesh.sequence = {table.sequence}"
    ring = table.sequence_kind == "ring"
    cuts = table.sequence * (2 if ring else 1) if table.sequence > 1 else 1
    if tokens % cuts:
        yield (
            f"{asked} workers cut a sequence into {cuts} stretches"
            f"{' (each has an early and a late one)' if ring else ''}, so data.sequence_tokens = "
            f"{tokens} must be a multiple of {cuts}"
        )
    elif table.sequence_parallel and tokens // table.sequence % table.tensor:
        yield (
            f"mesh.sequence_parallel = true: mesh.tensor = {table.tensor} workers cannot share "
            f"{tokens // table.sequence} tokens evenly; a divisor of that is accepted"
        )
    if not ring and heads and table.sequence > 1 and not kv_heads % table.tensor:
        yield from _uneven_heads(table.sequence, heads // table.tensor, kv_heads // table.tensor)


def _uneven_heads(sequence: int, heads: int, kv_heads: int) -> Iterator[str]:
    """heads, kv_heads: of a tensor worker."""
    asked = f'mesh.sequence = {sequence} with mesh.sequence_kind = "ulysses"'
    other = 'or mesh.sequence_kind = "ring"'
    if heads % sequence:
        yield (
            f"{asked}: workers cannot share {heads} heads of attention (model.heads / "
            f"mesh.tensor); a divisor of {heads} is accepted, {other}"
        )
    elif kv_heads % sequence and sequence % kv_heads:
        yield (
            f"{asked}: workers cannot share {kv_heads} heads of keys (model.kv_heads / "
            f"mesh.tensor); a divisor or a multiple of {kv_heads} is accepted, {other}"
        )
