"""Which settings of a job go together; one sentence for each that does not, with what is accepted.

Imports no torch, as `train.job` does not.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from train.combine_mesh import refused_mesh

if TYPE_CHECKING:
    from train.job import Job

IN_PLACE = ("elastic", "ray")
"""Launchers (`workers.where`) whose workers outlive each other."""
OF_PIPELINES = ("bamboo", "oobleck", "varuna")
"""Resilience modes that are about a pipeline's stages."""
ENDS = 2
"""Layers that a pipeline counts beside the decoder's: the embedding, and norm with output."""


def refused(job: "Job") -> Iterator[str]:
    """What does not go together, the most telling first."""
    yield from _mode(job)
    yield from refused_mesh(job)
    yield from _sharding(job)
    if job.workers.shares == "measured" and (
        job.sharding.stage or job.pipeline.stages or job.memory.offload != "none"
    ):
        yield (
            'workers.shares = "measured" is about workers that hold the whole state: '
            'sharding.stage = 0, pipeline.stages = 0 and memory.offload = "none" are accepted'
        )
    if job.workers.staleness is not None:
        yield from _staleness(job)
    yield from _compression(job)
    yield from _memory(job)
    if job.pipeline.stages:
        yield from _pipeline(job)


def _mode(job: "Job") -> Iterator[str]:
    mode, where = job.resilience.mode, job.workers.where
    in_place = where in IN_PLACE
    asked = f'resilience.mode = "{mode}"'
    if mode in ("gemini", *OF_PIPELINES) and not in_place:
        yield (
            f"{asked} needs workers that outlive each other, and workers.where = {where!r}: "
            f"{_either(IN_PLACE)} is accepted"
        )
    if mode == "gemini":
        if job.sharding.stage != 1:
            yield (
                f"{asked} keeps each worker's share of the state in its peers' memory, so "
                f"sharding.stage = {job.sharding.stage} must be 1"
            )
        if job.resilience.copies > job.workers.count:
            yield (
                f"resilience.copies = {job.resilience.copies} need as many workers, and "
                f"workers.count = {job.workers.count}: 2 to {job.workers.count} are accepted"
            )
    if mode in OF_PIPELINES and not job.pipeline.stages:
        yield f"{asked} is about the stages of a pipeline: pipeline.stages = 1 or more is accepted"
    if mode == "bamboo" and job.pipeline.stages == 1:
        yield f"{asked} has the stage before take over, so pipeline.stages must be 2 or more"
    if mode == "varuna" and not job.resilience.checkpoint_every_steps:
        yield (
            f"{asked} goes on from checkpoints, so resilience.checkpoint_every_steps = 0 must be "
            "1 or more"
        )
    if mode == "oobleck":
        least = (job.resilience.failures + 1) * job.pipeline.stages
        if job.workers.count < least:
            yield (
                f"{asked} needs resilience.failures + 1 = {job.resilience.failures + 1} pipelines "
                f"of pipeline.stages = {job.pipeline.stages} workers, so workers.count = "
                f"{job.workers.count} must be at least {least}"
            )
        micros = -(-job.batch_samples // job.micro_samples)
        if micros <= job.resilience.failures:
            yield (
                f"{asked} gives each of its pipelines a micro-batch, and run.batch_tokens has "
                f"{micros} of run.micro_batch_tokens = {job.run.micro_batch_tokens}: "
                f"resilience.failures + 1 = {job.resilience.failures + 1} or more are accepted"
            )


def _staleness(job: "Job") -> Iterator[str]:
    """Of workers that do not wait for each other at every step."""
    asked = f"workers.staleness = {job.workers.staleness}"
    wanted = {
        "workers.where = 'local'": job.workers.where == "local",
        "sharding.stage = 0": not job.sharding.stage,
        "a plain [mesh] and model.experts = 0": not job.meshed,
        "a plain [memory]": job.memory.plain,
        'compression.kind = "none"': job.compression.kind == "none",
        "communication.overlap = false": not job.communication.overlap,
        'optimizer.name = "adamw" or "sgd"': job.optimizer.name != "adafactor",
        "optimizer.clip_norm = 0, since no server sees a whole gradient,": not (
            job.optimizer.clip_norm
        ),
        "run.deterministic = false, since what is read depends on who is faster,": not (
            job.workers.staleness and job.run.deterministic
        ),
    }
    for setting, fits in wanted.items():
        if not fits:
            yield f"{asked} (HetPipe): {setting} is accepted"


def _sharding(job: "Job") -> Iterator[str]:
    stage = job.sharding.stage
    if not stage:
        return
    asked = f"sharding.stage = {stage}"
    if job.optimizer.name != "adamw":
        yield f'{asked} shares out AdamW\'s moments: optimizer.name = "adamw" is accepted'
    if job.pipeline.stages:
        yield (
            f"{asked} with pipeline.stages = {job.pipeline.stages}: a pipeline divides the state "
            "by layers already, and sharding.stage = 0 is accepted"
        )
    if job.workers.where in IN_PLACE and not (stage == 1 and job.resilience.mode == "gemini"):
        yield (
            f"{asked} with workers.where = {job.workers.where!r}: accepted are sharding.stage = 0, "
            'and 1 with resilience.mode = "gemini"; 1 to 3 with workers.where = "local"'
        )


def _compression(job: "Job") -> Iterator[str]:
    kind, overlap = job.compression.kind, job.communication.overlap
    wanted = {"onebit": "adamw", "dgc": "sgd"}
    asked = f'compression.kind = "{kind}"' if kind != "none" else "communication.overlap = true"
    if wanted.get(kind, job.optimizer.name) != job.optimizer.name:
        yield (
            f'{asked} is a form of optimizer.name = "{wanted[kind]}", but '
            f'optimizer.name = "{job.optimizer.name}"'
        )
    if overlap and kind in wanted and job.optimizer.clip_norm:
        yield (
            f"communication.overlap = true with {asked} needs optimizer.clip_norm = 0: workers "
            "clip before they send, and a gradient's norm is known only when all of it is there"
        )
    if (kind != "none" or overlap) and (job.sharding.stage or job.pipeline.stages):
        yield (
            f"{asked} is about workers that hold the whole state: sharding.stage = 0 and "
            "pipeline.stages = 0 are accepted"
        )


def _memory(job: "Job") -> Iterator[str]:
    table = job.memory
    if table.plain:
        return
    named = "activations" if table.offload == "none" else "offload"
    asked = f'memory.{named} = "{getattr(table, named)}"'
    if job.sharding.stage or job.pipeline.stages:
        yield (
            f"{asked} is about workers that hold the whole state: sharding.stage = 0 and "
            "pipeline.stages = 0 are accepted"
        )
    if table.offload == "none":
        return
    if job.optimizer.name != "adamw":
        yield (
            f'{asked} needs optimizer.name = "adamw", whose update goes stretch by stretch, not '
            f'"{job.optimizer.name}"'
        )
    if job.compression.kind != "none" or job.communication.overlap:
        yield (
            f'{asked} sends gradients as they are: compression.kind = "none" and '
            "communication.overlap = false are accepted"
        )
    if job.resilience.mode not in ("none", "checkpoint"):
        yield (
            f'{asked} with resilience.mode = "{job.resilience.mode}", which copies the state in '
            'memory: "none" and "checkpoint" are accepted'
        )
    if table.late_from_step and job.workers.where != "local":
        yield (
            f'memory.late_from_step needs workers.where = "local", not "{job.workers.where}": an '
            "update under way cannot be abandoned"
        )


def _pipeline(job: "Job") -> Iterator[str]:
    stages, count = job.pipeline.stages, job.workers.count
    asked = f"pipeline.stages = {stages}"
    if stages > count:
        yield f"{asked} needs as many workers, and workers.count = {count}"
    if not job.model.start_from and stages > job.model.layers + ENDS:
        yield (
            f"{asked}: a model of model.layers = {job.model.layers} has {ENDS} more with its ends, "
            f"so at most {job.model.layers + ENDS} are accepted"
        )
    yield from _cuts(job)
    if job.workers.where in IN_PLACE and job.resilience.mode not in OF_PIPELINES:
        yield (
            f"{asked} with workers.where = {job.workers.where!r} needs a way to lose a stage: "
            f"resilience.mode {_either(OF_PIPELINES)} is accepted, or workers.where = 'local'"
        )
    if job.workers.where not in IN_PLACE and count % stages:
        yield f"workers.count = {count} must be a multiple of {asked}, so that chains are whole"
    if job.batch_samples < count // stages:
        yield (
            f"run.batch_tokens has {job.batch_samples} samples, too few for {count // stages} "
            f"chains of {asked}"
        )
    if job.precision.compute == "bfloat16":
        yield f'{asked} keeps no masters: precision.compute = "float32" or "float64" is accepted'
    if job.optimizer.name != "adamw" and job.workers.staleness is None:  # else servers update
        yield f'{asked} updates layer by layer: optimizer.name = "adamw" is accepted'
    if job.model.tied_head and not job.model.start_from:
        yield (f"{asked} needs layers that share no weights: model.tied_head = false is accepted")


def _cuts(job: "Job") -> Iterator[str]:
    """Of stages that the job cuts itself."""
    cuts, layers = job.pipeline.cuts, job.model.layers + ENDS
    asked = f"pipeline.cuts = {list(cuts)}"
    if cuts and not job.model.start_from and cuts[-1] >= layers:
        yield (
            f"{asked}: a model of model.layers = {job.model.layers} has layers 0 to {layers - 1} "
            f"with its ends, so at most {layers - 1} is accepted"
        )
    if cuts and job.workers.where in IN_PLACE:
        yield (
            f"{asked} with workers.where = {job.workers.where!r}, where stages change with the "
            "workers that are left: pipeline.cuts = [] is accepted, or workers.where = 'local'"
        )


def _either(names: tuple[str, ...]) -> str:
    *most, last = [f'"{name}"' for name in names]
    return f"{', '.join(most)} or {last}"
