"""Where the weights, gradients and moments of a rank of a mesh are: whole on every data rank, or
shared out among data ranks by FSDP2 (ZeRO's stage 3), on top of what tensor ranks share.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from train.job import OptimizerTable
from train.layout import FlatModel
from train.optimizer import Decay, build_optimizer
from train.parallel.experts import Placement
from train.parallel.mesh import Axis
from train.parallel.mesh_model import ROW, MeshLlama
from train.parallel.tensor_exchange import total
from train.parallel.zero_full import FullShards, gradient, master

MASTER = "master"


class Held(NamedTuple):
    """Some rows of this tensor rank's part of a parameter, or of its moments (kind "exp_avg", ...):
    from row `first` of the part on. data: live, in the part's shape but for the rows."""

    kind: str
    name: str
    first: int
    data: Tensor


class MeshState(Protocol):
    """A rank's part of the training state. All methods but `squares`, `scale` and `held` are
    collective."""

    shared: bool
    """Whether data ranks share it; if not, they hold the same."""

    def clear(self) -> None:
        """Before the first backward pass of a step."""
        ...

    def reduce(self) -> None:
        """After the last one: gradients become sums over all ranks that have seen other tokens."""
        ...

    def squares(self) -> Tensor:
        """Of this rank's gradient: (2,), of what is split by tensor ranks and of what is not."""
        ...

    def scale(self, factor: float) -> None:
        """Multiplies the gradient."""
        ...

    def update(self, step: int, learning_rate: float) -> None:
        """The step-th update, from 1."""
        ...

    def held(self) -> Iterator[Held]:
        """Masters and moments, in an order that all ranks share."""
        ...

    def publish(self) -> None:
        """After masters were changed from outside: weights become theirs."""
        ...

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """This tensor rank's masters by name, in an order that all ranks share."""
        ...


class Replicated:
    """Every data rank has the replica's state."""

    shared = False

    def __init__(self, model: MeshLlama, compute: torch.dtype, table: OptimizerTable) -> None:
        self.model = model
        self.flat = FlatModel(model, compute)
        self.optimizer = build_optimizer(self.flat, table)
        self._everywhere = set(model.whole_everywhere)
        self._stretches = list(stretches(self.flat, model))

    def clear(self) -> None:
        """See `MeshState`."""
        self.flat.clear_gradient()

    def reduce(self) -> None:
        """See `MeshState`."""
        mesh, named = self.model.mesh, self.flat.named(self.flat.gradient)
        for stretch, axis in self._stretches:
            total(self.flat.gradient[stretch], axis)
        total(self.flat.gradient, mesh.sequence)
        if self.model.sequence_parallel:
            sum_norms([named[name] for name in self.model.whole_everywhere], self.model.mesh.tensor)

    def squares(self) -> Tensor:
        """See `MeshState`."""
        squares = torch.zeros(3, dtype=torch.float64)
        experts = set(self.model.expert_names)
        for name, found in self.flat.named(self.flat.gradient).items():
            place = 2 if name in experts else int(name in self._everywhere)
            squares[place] += found.square().sum()
        total(squares[2:], self.model.mesh.expert)
        squares[1] += squares[2]
        return squares[:2]

    def scale(self, factor: float) -> None:
        """See `MeshState`."""
        self.flat.gradient.mul_(factor)

    def update(self, step: int, learning_rate: float) -> None:
        """See `MeshState`."""
        self.optimizer.update(step, learning_rate)
        self.flat.publish()

    def held(self) -> Iterator[Held]:
        """See `MeshState`."""
        yield from (Held(MASTER, name, 0, part) for name, part in self.parts())
        for key, tensor in self.optimizer.tensors().items():
            kind, _, name = key.partition("/")
            yield Held(kind, name, 0, tensor)

    def publish(self) -> None:
        """See `MeshState`."""
        self.flat.publish()

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """See `MeshState`."""
        yield from self.flat.named(self.flat.masters).items()


def stretches(flat: FlatModel, model: MeshLlama) -> Iterator[tuple[slice, Axis]]:
    """Of the flat gradient: parts as long as can be, and the data ranks that have the same weights
    there. Under the name of an expert other ranks may have other ones."""
    experts = set(model.expert_names)
    for own, slots in groupby(flat.slots, key=lambda slot: slot.name in experts):
        found = list(slots)
        axis = model.mesh.replicas if own else model.mesh.data
        yield slice(found[0].start, found[-1].stop), axis


class FullyShared:
    """Data ranks share the replica's state; layers are put together when they are computed."""

    shared = True

    def __init__(self, model: MeshLlama, compute: torch.dtype, table: OptimizerTable) -> None:
        if model.mesh.expert.size > 1:
            raise ValueError("mesh.full_shard = true with mesh.expert > 1: false is accepted")
        if table.name != "adamw":
            raise ValueError(
                f'mesh.full_shard = true updates by optimizer.name = "adamw", not "{table.name}"'
            )
        decay = Decay(table.beta1, table.beta2, table.epsilon, table.weight_decay)
        self.model, self._everywhere = model, set(model.whole_everywhere)
        self._shards = FullShards(model, model.mesh.data.group, compute, decay)

    def clear(self) -> None:
        """See `MeshState`."""
        self._shards.clear_gradient()

    def reduce(self) -> None:
        """See `MeshState`. The sum over data ranks was made in the backward pass."""
        named = {rows.name: gradient(rows) for rows in self._shards.rows}
        found = {name: held for name, held in named.items() if held is not None}
        for held in found.values():
            total(held, self.model.mesh.sequence)
        if self.model.sequence_parallel:
            norms = [held for name, held in found.items() if name in self._everywhere]
            sum_norms(norms, self.model.mesh.tensor)

    def squares(self) -> Tensor:
        """See `MeshState`. Summed over data ranks, who have a share of each."""
        squares = torch.zeros(2, dtype=torch.float64)
        for rows in self._shards.rows:
            found = gradient(rows)
            if found is not None:
                squares[int(rows.name in self._everywhere)] += found.double().square().sum()
        return total(squares, self.model.mesh.data)

    def scale(self, factor: float) -> None:
        """See `MeshState`."""
        for rows in self._shards.rows:
            found = gradient(rows)
            if found is not None:
                found.mul_(factor)

    def update(self, step: int, learning_rate: float) -> None:
        """See `MeshState`."""
        self._shards.update(step, learning_rate)

    def held(self) -> Iterator[Held]:
        """See `MeshState`."""
        for rows in self._shards.rows:
            first = rows.start // math.prod(rows.shape[1:])
            kinds = {MASTER: master(rows), "exp_avg": rows.exp_avg, "exp_avg_sq": rows.exp_avg_sq}
            for kind, flat in kinds.items():
                yield Held(kind, rows.name, first, flat.view(-1, *rows.shape[1:]))

    def publish(self) -> None:
        """See `MeshState`. Weights are made of masters when they are used."""

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """See `MeshState`."""
        for rows in self._shards.rows:
            joined = torch.cat(gather_unlike(master(rows), self.model.mesh.data))
            yield rows.name, joined.view(rows.shape)


def sum_norms(gradients: list[Tensor], axis: Axis) -> None:
    """In place, over tensor ranks that have each seen their own tokens between matrices."""
    joined = total(torch.cat([found.flatten() for found in gradients]), axis)
    parts = torch.split(joined, [found.numel() for found in gradients])
    for found, summed in zip(gradients, parts, strict=True):
        found.copy_(summed.view_as(found))


def gather_unlike(part: Tensor, axis: Axis) -> list[Tensor]:
    """Every rank's tensor, by rank; they may differ in shape."""
    if axis.group is None:
        return [part.clone()]
    shapes: list[tuple[int, ...]] = [()] * axis.size
    dist.all_gather_object(shapes, tuple(part.shape), group=axis.group)
    found = [part.new_empty(shape) for shape in shapes]
    found[axis.rank].copy_(part)
    for rank, place in enumerate(found):
        dist.broadcast(place, group=axis.group, group_src=rank)
    return found


def whole_parameters(state: MeshState, model: MeshLlama) -> Iterator[tuple[str, Tensor]]:
    """The whole model's masters by name, on every rank, one after another; called by all."""
    everywhere, axis = set(model.whole_everywhere), model.mesh.tensor
    experts = set(model.expert_names)
    for name, part in state.parts():
        if name in experts:
            yield name, whole_experts(part, name, model)
        elif name in everywhere:
            yield name, part.clone()
        else:
            yield name, torch.cat(gather_unlike(part, axis), 1 if name.endswith(ROW) else 0)


def whole_experts(part: Tensor, name: str, model: MeshLlama) -> Tensor:
    """All experts of one layer, of the ranks that share them."""
    axis = model.mesh.expert
    parts = gather_unlike(part, axis)
    assert model.experts is not None
    slices = Placement.of(model.experts.experts, axis.size).slices
    groups = [parts[n : n + slices] for n in range(0, len(parts), slices)]
    return torch.cat([torch.cat(group, 2 if name.endswith("down") else 1) for group in groups])
