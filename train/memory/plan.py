"""What a job's `[memory]` will save and move, in bytes, by count. Behind `--dry-run`; measurements
are held against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.config import ModelConfig
from train.folder import RunFolder
from train.fused import written_out
from train.job import Job
from train.memory.codec import GROUP
from train.memory.segments import Layout, Segment, lay_out
from train.precision import COMPUTE, master_dtype

MOMENTS = ("exp_avg", "exp_avg_sq")
MIB = 1 << 20


@dataclass(frozen=True)
class LayerSaves:
    """Elements that a layer saves for its backward pass: in the compute dtype (narrow), and sums of
    norms and softmax, which no codec changes and which are in float32 at least. beside: what a
    plain run keeps since it lies in one tensor with what is saved. given: of its input."""

    narrow: int
    sums: int
    beside: int
    given: int


def layer_saves(config: ModelConfig, tokens: int, of_softmax: bool) -> LayerSaves:
    """For so many tokens, as `train.fused` has it. Norms save what they were given, products their
    inputs; attention query, key, value and result, and perhaps softmax's sums; SwiGLU four of its
    inner width. Values lie beside queries and keys as they were before rotation."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    narrow = 4 * config.hidden + 2 * query + 2 * key + 4 * config.ff
    sums = 2 + config.heads * of_softmax
    return LayerSaves(
        tokens * narrow, tokens * sums, tokens * (query + key), tokens * config.hidden
    )


def activation_bytes(job: Job, config: ModelConfig, tokens: int) -> tuple[int, int]:
    """What all layers save for `tokens` tokens: as a plain run does, and as the job does."""
    compute = COMPUTE[job.precision.compute]
    wide = master_dtype(compute).itemsize
    sums = not written_out(job.data.sequence_tokens, compute)
    found, table = layer_saves(config, tokens, sums), job.memory
    plain = (found.narrow + found.beside) * compute.itemsize + found.sums * wide
    asked = min(table.layers or config.layers, config.layers)
    changed = plain
    if table.activations in ("mesa", "gact"):
        bits = 8 if table.activations == "mesa" else table.bits
        numbers = found.narrow
        ranges = 8 * numbers // GROUP if table.activations == "gact" else 8 * 14 * config.heads
        changed = round(numbers * bits / 8) + ranges + found.sums * wide
    if table.activations == "recompute" or table.offload == "disk":
        changed = found.given * compute.itemsize
        if table.activations == "recompute" and table.recompute == "cheap":
            changed += _costly(config, tokens) * compute.itemsize + config.heads * tokens * wide
    if table.offload == "disk":
        asked = config.layers
    return plain * config.layers, plain * (config.layers - asked) + changed * asked


def _costly(config: ModelConfig, tokens: int) -> int:
    """Results of a layer's products and of its attention."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return tokens * (2 * query + 2 * key + 2 * config.hidden + 2 * config.ff)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step on one worker, from and to files."""

    read_bytes: int
    written_bytes: int


def disk_kinds(compute: torch.dtype) -> dict[str, torch.dtype]:
    """Files and their dtypes; "param" are their own masters where they are wide enough."""
    wide = master_dtype(compute)
    master = "param" if compute == wide else "master"
    return {"param": compute, "gradient": wide, master: wide} | dict.fromkeys(MOMENTS, wide)


def disk_traffic(layout: Layout, compute: torch.dtype, micros: int, workers: int) -> Traffic:
    """A step of `micros` micro-batches a worker. Layers come twice, forward and backward; a matrix
    in tiles once for each product with it, and its gradient is added to as often; then the update
    reads gradient, masters and moments and writes all but the gradient."""
    wide, narrow = master_dtype(compute).itemsize, compute.itemsize
    layers = sum(segment.padded for segment in layout.layers)
    read = (2 * layers + layout.norm.padded) * narrow
    written = (layers + layout.norm.padded) * wide
    for name, matrix in layout.matrices.items():
        uses, additions = _uses(layout, name, micros)
        size = sum(tile.padded for tile in matrix.tiles)
        read += size * (uses * narrow + additions * wide)
        written += size * wide * (additions + (workers > 1))
    every = sum(segment.padded for segment in layout.segments)
    separate = narrow if compute != master_dtype(compute) else 0
    return Traffic(read + 4 * every * wide, written + every * (3 * wide + separate))


def _uses(layout: Layout, name: str, micros: int) -> tuple[int, int]:
    """How often a step reads a matrix' tiles, and adds to their gradient."""
    uses = additions = 0
    if ".layers." in name:
        return 3 * micros, micros
    if layout.matrices[name] is layout.head:
        uses, additions = 2 * micros, micros
    if name.endswith("embed_tokens.weight"):
        uses, additions = uses + 1, additions + 1
    return uses, additions


def working_bytes(layout: Layout, compute: torch.dtype) -> int:
    """Memory for segments at most: those of an update under way, of the next one, and of three (or
    four) that are written."""
    largest = max(layout.segments, key=_padded).padded
    return (
        largest * (4 + 4 + 3 + (compute != master_dtype(compute))) * master_dtype(compute).itemsize
    )


def _padded(segment: Segment) -> int:
    return segment.padded


def offload_folder(job: Job, folder: RunFolder) -> Path | None:
    """Where the files of a job's state are; None: in no files."""
    if job.memory.folder:
        return Path(job.memory.folder)
    return folder.path / "offload" if job.memory.offload == "disk" else None


def memory_rows(job: Job, config: ModelConfig, parameters: int) -> Mapping[str, str]:
    """Lines of `--dry-run`; none where nothing is asked for."""
    if job.memory.plain:
        return {}
    samples = min(job.micro_samples, -(-job.batch_samples // job.workers.count))
    micros = -(-job.batch_samples // (job.workers.count * samples))
    plain, changed = activation_bytes(job, config, samples * job.data.sequence_tokens)
    rows = {
        "layers' activations": f"{plain / MIB:.1f} MiB, with memory.activations = "
        f"{job.memory.activations} {changed / MIB:.1f} MiB"
    }
    if job.memory.offload == "disk":
        rows |= _disk_rows(job, config, micros)
    if job.memory.offload == "cpu":
        compute = COMPUTE[job.precision.compute]
        weights, wide = parameters * compute.itemsize, master_dtype(compute).itemsize
        late = wide * bool(job.memory.late_from_step)
        rows["device"] = f"{weights / MIB:.1f} MiB of weights (counted: no device is here)"
        rows["host"] = f"{parameters * (4 * wide + late) / MIB:.1f} MiB in " + (
            f"files of {job.memory.folder}" if job.memory.folder else "plain memory"
        )
        rows["moved"] = f"{weights * (micros + 1) / MIB:.1f} MiB a step between them"
    return rows


def _disk_rows(job: Job, config: ModelConfig, micros: int) -> dict[str, str]:
    compute = COMPUTE[job.precision.compute]
    layout = lay_out(config, job.memory.tile_bytes // compute.itemsize)
    traffic = disk_traffic(layout, compute, micros, job.workers.count)
    files = layout.elements * sum(dtype.itemsize for dtype in disk_kinds(compute).values())
    where = offload_folder(job, RunFolder(job.path))
    return {
        "files": f"{files / MIB:.1f} MiB per worker in {where}",
        "segments in memory": f"at most {working_bytes(layout, compute) / MIB:.1f} MiB",
        "moved": f"{traffic.read_bytes / MIB:.1f} MiB read and {traffic.written_bytes / MIB:.1f} "
        "MiB written a step and worker",
    }
