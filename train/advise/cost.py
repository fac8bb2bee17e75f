"""What a form of a job costs: memory of the worker that has most, and seconds of a step, by
what they go into. Bytes are by `mesh_cost`, `estimate` and `memory.plan`; seconds are those bytes
over the machines' rates, and tried passes; pipelines by `amp`.
"""

import math
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from models.config import ModelConfig
from train.advise.amp import Assignment, LayerTable, Shape, assign
from train.advise.machines import Machines
from train.combine_mesh import uneven
from train.data.stream import share
from train.estimate import flops_per_token, moment_bytes, state_bytes
from train.heterogeneous.shares import shares
from train.job import Job
from train.memory.plan import activation_bytes as changed_bytes
from train.memory.plan import disk_traffic
from train.memory.plan import working_bytes as segments_bytes
from train.memory.segments import lay_out
from train.parallel import mesh_cost
from train.parallel.mesh_cost import WIDTHS_BYTES, MeshShape
from train.parallel.mesh_moments import working_bytes as mesh_working_bytes
from train.parallel.mesh_plan import moments_of
from train.precision import COMPUTE
from train.weights import Start

FORWARD = 1 / 3
"""Of a pass forward and backward: what is computed again costs as much (Chen et al. 2016)."""
CODED = 2.5
"""Times that a saved number's bytes are moved to be written in 8 bits and read again."""
TOUCHED = 6
"""Numbers moved for a weight in a step beside its moments: its gradient cleared, normed, clipped
and read, its master read and written. A moment is read and written."""


class Memory(NamedTuple):
    """Bytes of the worker that has most: between steps, of a pass, and for moments of it."""

    state: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        """All at once."""
        return self.state + self.kept + self.working


class Seconds(NamedTuple):
    """Of a step: computing, waiting in a pipeline, sending, updating, moving state to and fro."""

    compute: float
    bubble: float
    exchange: float
    update: float
    moved: float

    @property
    def total(self) -> float:
        """One after another: nothing overlaps."""
        return sum(self)


@dataclass(frozen=True)
class Cost:
    """why: the sentence that says why it does not fit; empty where it does. pipeline: who has which
    layers."""

    memory: Memory
    seconds: Seconds
    why: str = ""
    pipeline: Assignment | None = None


class Pricer:
    """Costs of forms of one job on one set of machines."""

    def __init__(self, start: Start, machines: Machines) -> None:
        self._start, self._machines = start, machines
        self._config: ModelConfig = start.config
        self._elements = mesh_cost.matrices(start.config, 1).elements

    def cost(self, job: Job) -> Cost:
        """Of a form that the job accepts. ValueError where the model cannot be divided so."""
        config = self._config
        if job.pipeline.stages:
            if config.tied_head:
                raise ValueError("pipeline.stages needs layers that share no weights")
            return self._pipeline(job)
        if job.meshed:
            for sentence in uneven(job, config.heads, config.kv_heads, config.ff):
                raise ValueError(sentence)
        memory = self._memory(job)
        seconds = Seconds(
            self._compute_s(job),
            0.0,
            self._exchange_s(job),
            self._update_s(job, self._held(job)),
            self._moved_s(job),
        )
        room = min(kind.memory_bytes for kind in self._machines.kinds)
        why = "" if memory.total <= room else _too_large(memory.total, room)
        return Cost(memory, seconds, why)

    def _memory(self, job: Job) -> Memory:
        config, compute = self._config, job.precision.compute
        shape = mesh_cost.shape_of(job)
        batch = mesh_cost.batch_of(job, shape)
        kept = float(mesh_cost.activation_bytes(config, shape, batch, compute))
        if not job.memory.plain:
            tokens = batch.micro_samples * batch.sequence_tokens
            plain, changed = changed_bytes(job, config, tokens)
            kept -= plain - changed
        working = float(mesh_working_bytes(config, shape, batch, compute).total)
        return Memory(self._state_bytes(job, shape), kept, working)

    def _state_bytes(self, job: Job, shape: MeshShape) -> float:
        config, compute = self._config, job.precision.compute
        narrow, wide = WIDTHS_BYTES[compute]
        if job.memory.offload == "disk":
            layout = lay_out(config, job.memory.tile_bytes // narrow)
            return float(segments_bytes(layout, COMPUTE[compute]))
        if job.sharding.stage:
            moments = moment_bytes(job, self._start, wide)
            return float(state_bytes(job, self._start, self._elements, moments))
        found = mesh_cost.state_bytes(config, shape, compute, moments_of(job))
        if job.memory.offload == "cpu" and not self._here:
            return float(narrow * self._elements)
        return float(found.total)

    @property
    def _here(self) -> bool:
        return all(kind.name == "here" for kind in self._machines.kinds)

    def _held(self, job: Job) -> float:
        """Weights that a worker updates."""
        held = self._elements / job.mesh.tensor
        shared = job.sharding.stage or job.mesh.full_shard
        return held / (job.workers.count // job.mesh.replica_workers) if shared else held

    def _compute_s(self, job: Job) -> float:
        """Until the slowest worker has done its samples."""
        speeds = [kind.speed for kind in self._machines.kinds for _ in range(kind.count)]
        inner = job.mesh.replica_workers
        replicas = job.workers.count // inner
        if job.workers.shares == "measured":
            counts = shares(job.batch_samples, speeds, job.micro_samples)
        else:
            counts = [share(0, job.batch_samples, n, replicas).samples for n in range(replicas)]
            speeds = [min(speeds)] * replicas
        pairs = zip(counts, speeds, strict=True)
        return max(self._samples_s(job, count, inner) / speed for count, speed in pairs)

    def _samples_s(self, job: Job, samples: int, inner: int) -> float:
        whole, rest = divmod(samples, job.micro_samples)
        sizes = chain([job.micro_samples] * whole, [rest] if rest else [])
        return sum(self._pass_s(job, size, inner) for size in sizes)

    def _pass_s(self, job: Job, samples: int, inner: int) -> float:
        """Of a worker's part of a micro-batch that `inner` workers share, as of so much smaller a
        micro-batch; what is computed again or written in few bits included."""
        part = samples / inner
        seconds = self._machines.pass_s(math.ceil(part)) * part / math.ceil(part)
        if job.memory.activations == "recompute" or job.memory.offload == "disk":
            seconds *= 1 + FORWARD
        if job.memory.activations == "mesa":
            tokens = samples * job.data.sequence_tokens
            plain, _ = changed_bytes(job, self._config, tokens)
            seconds += CODED * plain / self._bandwidth
        return seconds

    @property
    def _bandwidth(self) -> float:
        return min(kind.memory_bytes_per_s for kind in self._machines.kinds)

    def _exchange_s(self, job: Job) -> float:
        """Of the worker that sends most; no message leaves while something is computed."""
        config, compute = self._config, job.precision.compute
        machines, links = self._machines, self._machines.links
        narrow, wide = WIDTHS_BYTES[compute]
        shape = mesh_cost.shape_of(job)
        if job.sharding.stage == 3:
            shape = MeshShape(replicas=job.workers.count, full_shard=True)
        batch = mesh_cost.batch_of(job, shape)
        sent = mesh_cost.sent_bytes(config, shape, batch, compute)
        within = min(kind.link_bytes_per_s for kind in machines.kinds)
        everywhere = within if len(machines.kinds) == 1 else links.network_bytes_per_s
        fits = shape.tensor * shape.sequence <= min(kind.count for kind in machines.kinds)
        inner = within if fits else min(within, links.network_bytes_per_s)
        passes, layers = batch.passes, config.layers
        messages = 8 * layers * passes * 2 * (shape.tensor - 1)
        messages += 5 * layers * passes * (shape.sequence - 1)
        rounds = (2 * passes + 1) * (layers + 1) if shape.shared else 2
        messages += rounds * (shape.replicas - 1)
        return (
            sent.data / everywhere
            + (sent.sequence + sent.tensor) / inner
            + messages * links.latency_s
        )

    def _update_s(self, job: Job, elements: float) -> float:
        _, wide = WIDTHS_BYTES[job.precision.compute]
        numbers = TOUCHED + 2 * moments_of(job)
        return numbers * wide * elements / self._bandwidth

    def _moved_s(self, job: Job) -> float:
        """To the host and back, or to files."""
        narrow, _ = WIDTHS_BYTES[job.precision.compute]
        batch = mesh_cost.batch_of(job, mesh_cost.shape_of(job))
        if job.memory.offload == "cpu":
            moved = narrow * self._elements * (batch.passes + 1)
            return moved / self._machines.host_bytes_per_s
        if job.memory.offload == "disk":
            layout = lay_out(self._config, job.memory.tile_bytes // narrow)
            compute = COMPUTE[job.precision.compute]
            traffic = disk_traffic(layout, compute, batch.passes, job.workers.count)
            return (traffic.read_bytes + traffic.written_bytes) / self._machines.disk_bytes_per_s
        return 0.0

    def _pipeline(self, job: Job) -> Cost:
        stages = job.pipeline.stages
        replicas = job.workers.count // stages
        micros = -(-job.batch_samples // (replicas * job.micro_samples))
        table = self.layers(job)
        shape = Shape(stages, replicas, micros)
        kinds, links = self._machines.kinds, self._machines.links
        found = assign(table, kinds, links, shape, job.pipeline.cuts)
        room = min(kind.memory_bytes for kind in kinds)
        if found is None:
            whole = sum(table.state_bytes) + sum(table.kept_bytes)
            said = _too_large(whole / stages, room)
            return Cost(Memory(whole, 0.0, 0.0), Seconds(0, 0, 0, 0, 0), said)
        spans = [(s.start, s.stop) for s in found.stages]
        state = [sum(table.state_bytes[a:b]) for a, b in spans]
        kept = [
            min(micros, stages - n) * sum(table.kept_bytes[a:b]) for n, (a, b) in enumerate(spans)
        ]
        most = max(range(stages), key=lambda n: state[n] + kept[n])
        compute = micros * max(stage.seconds for stage in found.stages)
        elements = max(state) / self._stage_bytes(job)
        seconds = Seconds(
            compute,
            found.step_s(micros) - found.sum_s - compute,
            found.sum_s,
            self._update_s(job, elements),
            0.0,
        )
        return Cost(Memory(state[most], kept[most], 0.0), seconds, "", found)

    def _stage_bytes(self, job: Job) -> float:
        """Of a weight: itself, its gradient and its moments, all as computed with."""
        narrow, _ = WIDTHS_BYTES[job.precision.compute]
        return (2.0 + moments_of(job)) * narrow

    def layers(self, job: Job) -> LayerTable:
        """The model's layers as a pipeline has them: the embedding, the decoder's, norm and output;
        seconds of a micro-batch by their share of the operations."""
        config, narrow = self._config, WIDTHS_BYTES[job.precision.compute][0]
        tokens = job.micro_samples * job.data.sequence_tokens
        whole = mesh_cost.matrices(config, 1)
        rows = config.vocab * config.hidden
        inner = (whole.elements - 2 * rows - config.hidden) / config.layers
        weights = [float(rows), *[inner] * config.layers, float(rows + config.hidden)]
        flops = flops_per_token(config, whole.elements, job.data.sequence_tokens)
        attention = (flops - 6.0 * (whole.elements - rows)) / config.layers
        parts = [6.0 * config.hidden, *[6 * inner + attention] * config.layers, 6.0 * weights[-1]]
        seconds = self._machines.pass_s(job.micro_samples)
        shape, batch = (
            MeshShape(),
            mesh_cost.Batch(job.micro_samples, job.micro_samples, 1, job.data.sequence_tokens),
        )
        kept = mesh_cost.activation_bytes(config, shape, batch, job.precision.compute)
        plain = kept / config.layers
        return LayerTable(
            tuple(seconds * part / sum(parts) for part in parts),
            (0.0, *[plain] * config.layers, 0.0),
            (float(narrow * tokens * config.hidden),) * len(weights),
            tuple(self._stage_bytes(job) * weight for weight in weights),
            tuple(narrow * weight for weight in weights),
        )


def _too_large(needed: float, room: float) -> str:
    return f"needs {needed / 2**20:,.0f} MiB of a worker that has {room / 2**20:,.0f}"
