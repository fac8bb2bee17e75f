"""ZeRO's stages 1 and 2: weights in flat buckets, each rank the owner of one N-th of each bucket.

Buckets are in the order in which a backward pass completes them. In stage 2 a bucket's gradient is
summed and shared out as soon as all of it is there, and what is not this rank's is let go.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoint.piece import Piece, dtype_name
from train.optimizer import Decay, adamw_update
from train.parallel.collectives import Collectives
from train.precision import master_dtype

BUCKET_ELEMENTS = 4 << 20


class Source(Protocol):
    """What a sharded state is loaded from: a checkpoint, whoever wrote it."""

    @property
    def names(self) -> Sequence[str]:
        """Its tensors, "<kind>/<parameter>"."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A stretch of one, flattened."""
        ...


@dataclass(frozen=True)
class Slot:
    """A parameter's elements start to stop of its bucket."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int


class Bucket:
    """Parameters of one kind in a flat buffer. weights: all, padded to whole shares, in the compute
    dtype; master: this rank's share (the same memory where dtypes agree), exp_avg, exp_avg_sq
    beside it; gradient: all of it in stage 1, the share in stage 2."""

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter]], stage: int, compute: torch.dtype,
        rank: int, size: int,
    ) -> None:  # fmt: skip
        self.slots = tuple(_slots(parameters))
        self.decayed = parameters[0][1].dim() > 1
        elements = -(-self.slots[-1].stop // size) * size
        self.share = elements // size
        self.first, self.last = rank * self.share, (rank + 1) * self.share
        wide = master_dtype(compute)
        whole = torch.zeros(elements, dtype=wide)
        for slot in self.slots:
            whole[slot.start : slot.stop] = slot.parameter.detach().flatten()
        self.weights = whole.to(compute)
        own = self.weights[self.first : self.last]
        self.master = own if compute == wide else whole[self.first : self.last].clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.gradient = torch.zeros(elements if stage == 1 else self.share, dtype=compute)
        for slot in self.slots:
            shape = slot.parameter.shape
            slot.parameter.data = self.weights[slot.start : slot.stop].view(shape)

    def pieces(self) -> Iterator[Piece]:
        """This rank's stretch of every parameter, of weights, masters and moments."""
        own = self.weights[self.first : self.last]
        kinds = {"param": own, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.master.dtype != self.weights.dtype:
            kinds["master"] = self.master
        for slot in self.slots:
            first, last = max(slot.start, self.first), min(slot.stop, self.last)
            for kind, share in kinds.items():
                if first < last:
                    data = share[first - self.first : last - self.first]
                    shape = tuple(slot.parameter.shape)
                    span = (first - slot.start, last - slot.start)
                    yield Piece(f"{kind}/{slot.name}", shape, dtype_name(data.dtype), *span, data)

    def load(self, source: Source) -> None:
        """This rank's share; the weights of others are theirs to send."""
        for slot in self.slots:
            first, last = max(slot.start, self.first), min(slot.stop, self.last)
            if first < last:
                place = slice(first - self.first, last - self.first)
                span = (first - slot.start, last - slot.start)
                self.master[place] = source.read(best_name(source, slot.name), *span)
                self.exp_avg[place] = source.read(f"exp_avg/{slot.name}", *span)
                self.exp_avg_sq[place] = source.read(f"exp_avg_sq/{slot.name}", *span)


class FlatShards:
    """A `train.parallel.zero.Sharded` of stage 1 or 2."""

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None, stage: int, compute: torch.dtype,
        decay: Decay, bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:  # fmt: skip
        assert stage in (1, 2)
        self._collectives = Collectives(group)
        self._stage, self._decay = stage, decay
        rank, size = self._collectives.rank, self._collectives.size
        self.buckets = [
            Bucket(parameters, stage, compute, rank, size)
            for parameters in _grouped(model, bucket_elements)
        ]
        self._arrived: list[dict[str, Tensor]] = [{} for _ in self.buckets]
        self._next = 0
        for place, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                self._collect(place, bucket, slot)

    def _collect(self, place: int, bucket: Bucket, slot: Slot) -> None:
        if self._stage == 1:
            views = bucket.gradient[slot.start : slot.stop]
            slot.parameter.grad = views.view(slot.parameter.shape)
            return

        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._arrived[place][slot.name] = parameter.grad
            parameter.grad = None
            self._send_complete()

        slot.parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def _send_complete(self, all_of_them: bool = False) -> None:
        """Sums buckets whose gradients are all there, in their order, which all ranks share."""
        while self._next < len(self.buckets):
            bucket, arrived = self.buckets[self._next], self._arrived[self._next]
            if len(arrived) < len(bucket.slots) and not all_of_them:
                return
            whole = torch.zeros_like(bucket.weights)
            for slot in bucket.slots:
                if slot.name in arrived:
                    whole[slot.start : slot.stop] = arrived[slot.name].flatten()
            arrived.clear()
            bucket.gradient += self._collectives.reduce_scatter(whole)
            self._next += 1
        if not all_of_them:
            self._next = 0  # for the next backward pass

    def clear_gradient(self) -> None:
        """See `Sharded`."""
        for bucket in self.buckets:
            bucket.gradient.zero_()

    def reduce(self) -> None:
        """See `Sharded`."""
        if self._stage == 2:
            if self._next or any(self._arrived):  # parameters that the last pass did not reach
                self._send_complete(all_of_them=True)
                self._next = 0
            return
        for bucket in self.buckets:
            own = bucket.gradient[bucket.first : bucket.last]
            own.copy_(self._collectives.reduce_scatter(bucket.gradient))

    def clip(self, limit: float) -> float:
        """See `Sharded`."""
        shares = [self._own(bucket) for bucket in self.buckets]
        norm = math.sqrt(self._collectives.sum(squares(shares)))
        if limit and norm > limit:
            for share in shares:
                share.mul_(limit / (norm + 1e-6))
        return norm

    def update(self, step: int, learning_rate: float) -> None:
        """See `Sharded`."""
        for bucket in self.buckets:
            decay = self._decay if bucket.decayed else replace(self._decay, weight_decay=0.0)
            adamw_update(
                bucket.master,
                self._own(bucket).to(bucket.master.dtype),
                (bucket.exp_avg, bucket.exp_avg_sq),
                step=step,
                learning_rate=learning_rate,
                decay=decay,
            )
            self._publish(bucket)

    def _own(self, bucket: Bucket) -> Tensor:
        if self._stage == 1:
            return bucket.gradient[bucket.first : bucket.last]
        return bucket.gradient

    def _publish(self, bucket: Bucket) -> None:
        if bucket.master.dtype != bucket.weights.dtype:
            bucket.weights[bucket.first : bucket.last] = bucket.master
        self._collectives.all_gather(bucket.weights)

    def pieces(self) -> list[Piece]:
        """See `Sharded`."""
        return [piece for bucket in self.buckets for piece in bucket.pieces()]

    def load(self, source: Source) -> None:
        """See `Sharded`."""
        for bucket in self.buckets:
            bucket.load(source)
            self._publish(bucket)


def best_name(source: Source, name: str) -> str:
    """A parameter's masters, or its weights where those are their own masters."""
    master = f"master/{name}"
    return master if master in source.names else f"param/{name}"


def squares(tensors: Sequence[Tensor]) -> float:
    """The sum of the squares of all elements."""
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)


def _grouped(model: nn.Module, limit: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters from the last to the first, in buckets of matrices or of vectors."""
    waiting: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in reversed(list(model.named_parameters())):
        group = waiting[parameter.dim() > 1]
        group.append((name, parameter))
        if sum(held.numel() for _, held in group) >= limit:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


def _slots(parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Slot]:
    start = 0
    for name, parameter in parameters:
        yield Slot(name, parameter, start, start + parameter.numel())
        start += parameter.numel()
