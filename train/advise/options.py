"""The forms that a job can take on its workers, as settings of its own file, and what of them does
not go together.

Whether a form is accepted is asked of the job itself (`train.combine`), so that everything that is
advised runs. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from train.combine import ENDS, refused
from train.job import Job

Settings = Mapping[str, Any]
"""`table.field`: value, of what is unlike the field's default."""

ACTIVATIONS = ("keep", "recompute", "mesa")
OFFLOADS = ("none", "cpu", "disk")
ACCEPTED_SIZES = 6
"""Sizes of a micro-batch that are tried, from all of a replica's samples downwards by halves."""


@dataclass(frozen=True)
class Option:
    """One form. job: the job in it; settings: what to write into its file; why: the sentence by
    which it is refused, empty where it is accepted."""

    job: Job
    settings: Settings
    why: str = ""


def options(job: Job, layers: int, unlike: bool = False) -> Iterator[Option]:
    """Every form: sizes of a mesh or a pipeline, ZeRO's stages, what is kept, where state is, and
    micro-batches. layers: the model's; unlike: devices have unlike speeds, so that shares
    by speed are worth a try."""
    for form in _forms(job.workers.count, layers + ENDS, unlike):
        for activations, offload in product(ACTIVATIONS, OFFLOADS):
            memory = {"memory.activations": activations, "memory.offload": offload}
            for size in _sizes(job, form):
                yield _option(job, {**form, **memory, "run.micro_batch_tokens": size})


def _forms(workers: int, layers: int, unlike: bool) -> Iterator[dict[str, Any]]:
    """Ways to divide workers: a mesh, or a pipeline, or ZeRO's stages, or none."""
    for stage in range(4):
        yield {"sharding.stage": stage}
    if unlike:
        yield {"workers.shares": "measured"}
    for stages in _divisors(workers):
        if 1 < stages <= layers:
            yield {"pipeline.stages": stages}
    for tensor, sequence in product(_divisors(workers), repeat=2):
        if workers % (tensor * sequence):
            continue
        replicas = workers // (tensor * sequence)
        kinds = ("ring", "ulysses") if sequence > 1 else ("ring",)
        tokens = (False, True) if tensor > 1 else (False,)
        for full, kind, shared in product((False, True), kinds, tokens):
            if (full and replicas == 1) or (tensor == sequence == 1 and not full):
                continue
            yield {
                "mesh.tensor": tensor,
                "mesh.sequence": sequence,
                "mesh.sequence_kind": kind,
                "mesh.sequence_parallel": shared,
                "mesh.full_shard": full,
            }


def replicas_of(job: Job) -> int:
    """Workers, or groups of workers, that compute samples of their own."""
    return job.workers.count // (job.mesh.replica_workers * max(job.pipeline.stages, 1))


def _sizes(job: Job, form: Mapping[str, Any]) -> Iterator[int]:
    """Tokens of a micro-batch: all of a replica's, half of them, ... one sample."""
    inner = form.get("mesh.tensor", 1) * form.get("mesh.sequence", 1)
    inner *= form.get("pipeline.stages", 1)
    samples = -(-job.batch_samples // (job.workers.count // inner))
    for _ in range(ACCEPTED_SIZES):
        yield samples * job.data.sequence_tokens
        if samples == 1:
            return
        samples = -(-samples // 2)


def _option(job: Job, settings: Mapping[str, Any]) -> Option:
    """The job in a form, and how it is refused."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        table, field = name.split(".")
        tables.setdefault(table, {})[field] = value
    tables["workers"] = {"shares": "equal", "staleness": None} | tables.get("workers", {})
    for table in ("sharding", "pipeline", "mesh", "memory"):
        fields = type(getattr(job, table)).model_fields
        whole = {name: field.default for name, field in fields.items()}
        tables[table] = whole | tables.get(table, {})
    try:
        update = {
            name: type(getattr(job, name)).model_validate(getattr(job, name).model_dump() | values)
            for name, values in tables.items()
        }
    except ValidationError as error:
        return Option(job, told(settings), error.errors()[0]["msg"].removeprefix("Value error, "))
    made = job.model_copy(update=update)
    return Option(made, told(settings), next(refused(made), ""))


def told(settings: Mapping[str, Any]) -> Settings:
    """Of settings those that are not as a file that says nothing has them."""
    plain = Job()
    found = {}
    for name, value in settings.items():
        table, field = name.split(".")
        if getattr(getattr(plain, table), field) != value or name == "run.micro_batch_tokens":
            found[name] = value
    return found


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
