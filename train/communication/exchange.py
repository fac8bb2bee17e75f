"""How a step's gradient becomes the sum over all workers: dense in one call, compressed, or in
buckets while the backward pass goes on; and the optimizer that belongs to it.
"""

import math
from collections.abc import Callable

import torch

from train.communication.compressor import Compressor, Memory, Owned, Part, regrouped
from train.communication.dgc import DeepGradient
from train.communication.freeze import UNDECIDED, Freeze
from train.communication.onebit import OneBitAdam, SignCompressor
from train.communication.overlap import Overlap, Span, spans_of
from train.communication.powersgd import PowerSgd
from train.communication.qsgd import Qsgd
from train.communication.transport import Transport, dense_bytes
from train.job import Job
from train.layout import EXTRA, FlatModel
from train.optimizer import Optimizer, Sgd, build_optimizer, clip
from train.tables import CompressionTable
from train.world import World


class Exchange:
    """One worker's. Each step: `begin`, `follow` before its last backward pass, `sum`.

    sent_bytes: what this worker sent in the last step; dense_bytes: what it would have sent
    uncompressed; optimizer: None for the job's; transport: what opens a world's, for tests on slow
    links.
    """

    def __init__(self, job: Job, flat: FlatModel, optimizer: Optimizer | None = None) -> None:
        self.job, self.flat = job, flat
        self.compressor = build_compressor(job)
        self.optimizer = optimizer or _optimizer(job, flat)
        overlap = job.communication.overlap
        whole = [(0, flat.gradient.numel())]
        self.spans = spans_of(flat, job.communication.bucket_bytes) if overlap else whole
        self.parts = [_part(flat, span) for span in self.spans] if self.compressor else []
        self.transport: Callable[[World], Transport] = Transport
        self.sent_bytes = self.dense_bytes = 0
        self._overlap = Overlap(_parameters(flat, self.spans), self._send) if overlap else None
        self._step = 0
        self._link: Transport | None = None
        self._generation: int | None = None
        self._loaded: dict[int, Owned] | None = None
        self._rank = 0

    def begin(self, world: World, step: int) -> None:
        """Step `step` (from 1) begins, in a world that may be another than the last step's."""
        if self._overlap:
            self._overlap.begin()
        self._link, self._step, self._rank = self.transport(world), step, world.rank
        if self.compressor:
            if isinstance(self.optimizer, OneBitAdam):
                self.compressor.warmup_steps = self.optimizer.freeze.steps
            self._memory.abandon()
            self._agree(world)

    def follow(self) -> None:
        """The next backward pass is the step's last: what it completes may leave at once."""
        if self._overlap:
            self._overlap.follow()

    def sum(self) -> float:
        """Replaces the gradient and what is summed with it by the sum over workers, clipped; the
        norm before. After 1-bit Adam's freeze and with DGC what comes is no gradient but a step's
        momentum: then workers clip their own before, and the norm is the momentum's."""
        link, flat, limit = self._link, self.flat, self.job.optimizer.clip_norm
        assert link is not None, "begin comes before"
        local = self._clips_locally()
        if local:
            # The sum of N such gradients, if they are independent, is as long as `limit`.
            clip(flat.gradient, limit / math.sqrt(link.size))
        if self._overlap:
            self._overlap.finish()
        elif self.compressor:
            self._send(0)
        if self._overlap or self.compressor:
            link.all_reduce(flat.summed[-EXTRA:])
        else:
            link.all_reduce(flat.summed)
        if isinstance(self.optimizer, OneBitAdam):
            self.optimizer.freeze.agree(self.optimizer.exp_avg_sq, self._step - 1, link)
        if self.compressor:
            self._memory.commit()
        self.sent_bytes = link.sent_bytes
        self.dense_bytes = dense_bytes(flat.summed.nbytes, link.size)
        return clip(flat.gradient, 0 if local else limit)

    def memory(self) -> dict[int, Owned]:
        """What differs by rank: this rank's, live; of all ranks where it was loaded just now."""
        if self._loaded is not None:
            return self._loaded
        if self.compressor is None or not self._memory.kept:
            return {}
        return {self._rank: self._memory.kept}

    def load(self, ranks: dict[int, Owned]) -> None:
        """Goes on with the memory of a checkpoint's ranks, or with none."""
        self._loaded = ranks

    def formula_bytes(self, size: int) -> float:
        """What a worker of `size` sends in a step after the warm-up, by the formula."""
        flat = self.flat
        if self.compressor is None or size == 1:
            return dense_bytes(flat.summed.nbytes, size)
        item = flat.gradient.element_size()
        parts = sum(self.compressor.formula_bytes(part, size, item) for part in self.parts)
        return parts + dense_bytes(EXTRA * item, size)

    def memory_bytes(self, size: int) -> int:
        """Of what a worker of `size` remembers between steps."""
        if self.compressor is None or size == 1:
            return 0
        values = sum(self.compressor.memory_values(part, size) for part in self.parts)
        return values * self.flat.gradient.element_size()

    @property
    def _memory(self) -> Memory:
        assert self.compressor is not None
        return self.compressor.memory

    def _agree(self, world: World) -> None:
        """When the set of workers has changed, memory that has to be equal on all of them stays
        only if all of them have just read it from a checkpoint."""
        if self._generation == world.generation and self._loaded is None:
            return
        if self._loaded is not None:
            self._memory.kept = regrouped(self._loaded, world.rank, world.size)
            self._check()
        fresh = self._generation is None or self._loaded is not None
        votes = torch.tensor([float(fresh)])
        world.all_reduce(votes)
        if float(votes) < world.size:
            self._memory.forget_shared()
        self._generation, self._loaded = world.generation, None

    def _check(self) -> None:
        """ValueError when a checkpoint's memory is of other parts."""
        known = {part.key for part in self.parts}
        for name in self._memory.kept:
            if name.split("/")[1] not in known:
                raise ValueError(
                    f"state: {name} is of buckets that communication.bucket_bytes = "
                    f"{self.job.communication.bucket_bytes} does not make; give the value that the "
                    "checkpoint was made with."
                )

    def _clips_locally(self) -> bool:
        if self.compressor is None or not self.compressor.clips_locally:
            return False
        frozen = self._step > self.compressor.warmup_steps
        return frozen or not isinstance(self.optimizer, OneBitAdam)

    def _send(self, number: int) -> None:
        """Sums one part, in place."""
        start, stop = self.spans[number]
        place, link = self.flat.gradient[start:stop], self._link
        assert link is not None
        if self.compressor is None:
            link.all_reduce(place)
            return
        local, rule = place, self.optimizer
        if isinstance(rule, OneBitAdam) and self._step > rule.freeze.steps:
            local = rule.outgoing(start, stop, link.size)
        place.copy_(self.compressor.reduce(self.parts[number], local, link, self._step))


def build_compressor(job: Job) -> Compressor | None:
    """What the job's table names, or None for sums as they are."""
    table: CompressionTable = job.compression
    warmup, seed = table.given_steps, job.run.seed
    if table.kind == "onebit":
        return SignCompressor(UNDECIDED if warmup is None else warmup)
    assert warmup is not None, "only 1-bit Adam decides for itself"
    if table.kind == "powersgd":
        return PowerSgd(table.rank, warmup, seed)
    if table.kind == "dgc":
        return DeepGradient(table.ratio, job.optimizer.beta1, warmup)
    return Qsgd(table.bits, warmup, seed) if table.kind == "qsgd" else None


def _optimizer(job: Job, flat: FlatModel) -> Optimizer:
    """The job's; where the compressor has a part of the rule, the rest of it."""
    if job.compression.kind == "onebit":
        rises = round(job.schedule.warmup * job.steps)
        freeze = Freeze(job.compression.given_steps, job.optimizer.beta2, rises)
        return OneBitAdam(flat, job.optimizer, freeze)
    if job.compression.kind == "dgc":
        return Sgd(flat, job.optimizer, momentum=0)
    return build_optimizer(flat, job.optimizer)


def _part(flat: FlatModel, span: Span) -> Part:
    start, stop = span
    shapes = tuple(slot.shape for slot in flat.slots if start <= slot.start < stop)
    return Part(f"{start}-{stop}", shapes)


def _parameters(flat: FlatModel, spans: list[Span]) -> list[list[torch.nn.Parameter]]:
    named = dict(flat.model.named_parameters())
    return [
        [named[slot.name] for slot in flat.slots if start <= slot.start < stop]
        for start, stop in spans
    ]
