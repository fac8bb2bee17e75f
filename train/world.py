"""The workers that train together, as each of them sees the others.

`World` is what a training step asks for. `LocalWorld` is a world of one; `GlooWorld` is a fixed set
of processes over torch.distributed's gloo. Worlds that change while a job runs keep to the same
protocol: between two `WorldChanged` nothing about them changes.
"""

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from collections.abc import Iterator


class WorldChanged(Exception):
    """A member is gone, or a new plan is due: abandon the step under way.

    lost: ranks (of the generation that ends) that are gone; empty when none is, or none is known.
    The state of the last finished step is whole on every survivor.
    """

    def __init__(self, lost: frozenset[int] = frozenset(), reason: str = "") -> None:
        self.lost, self.reason = lost, reason
        gone = f"ranks {sorted(lost)} are gone" if lost else "the set of workers changes"
        super().__init__(f"{gone}: {reason}" if reason else gone)


class World(Protocol):
    """A set of `size` workers, numbered 0 to size - 1; this one is `rank`.

    Every method but `send` and `recv` is called by all of them in the same order, with tensors of
    equal shape and dtype, contiguous. Each raises `WorldChanged` when it cannot be completed, and
    what it would have written is then undefined. generation: how often the set has changed.
    """

    rank: int
    size: int
    generation: int
    group: dist.ProcessGroup | None
    """For users of DTensor and FSDP2; None where there is no process group."""

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place, the same bits on every rank."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """The tensor of rank `source`, in place everywhere else."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's tensor, by rank; this rank's own entry may share its memory."""
        ...

    def send(self, tensor: Tensor, to: int) -> None:
        """Hands a tensor to rank `to`, which calls `recv` with one of the same shape."""
        ...

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fills the tensor with what rank `source` sends."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...


class LocalWorld:
    """One worker, alone; sums are what they were."""

    rank = 0
    size = 1
    group: dist.ProcessGroup | None = None

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation

    def all_reduce(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Nobody to send to."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Its own."""
        return [tensor]

    def send(self, tensor: Tensor, to: int) -> None:
        """There is nobody: a fault of the caller."""
        raise AssertionError(f"a world of one has no rank {to}")

    def recv(self, tensor: Tensor, source: int) -> None:
        """There is nobody: a fault of the caller."""
        raise AssertionError(f"a world of one has no rank {source}")

    def barrier(self) -> None:
        """It is there."""


class GlooWorld:
    """A fixed set of processes over gloo. A peer's death, or silence for timeout_s, is a
    `WorldChanged` whose `lost` is empty, since gloo does not say who.

    Sums go round a ring or a tree that depends on rank and size only, and every rank gets the one
    result, so runs at one size are equal to the bit.
    """

    def __init__(self, group: dist.ProcessGroup, generation: int = 0) -> None:
        self.group: dist.ProcessGroup | None = group
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.generation = generation

    def all_reduce(self, tensor: Tensor) -> None:
        """See `World`."""
        with as_change():
            dist.all_reduce(tensor, group=self._group)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """See `World`."""
        with as_change():
            dist.broadcast(tensor, group=self._group, group_src=source)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `World`."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with as_change():
            dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    def send(self, tensor: Tensor, to: int) -> None:
        """See `World`."""
        with as_change():
            dist.send(tensor, group=self._group, group_dst=to)

    def recv(self, tensor: Tensor, source: int) -> None:
        """See `World`."""
        with as_change():
            dist.recv(tensor, group=self._group, group_src=source)

    def barrier(self) -> None:
        """See `World`."""
        with as_change():
            dist.barrier(group=self._group)

    def close(self) -> None:
        """Leaves the process group; the world is not used afterwards."""
        dist.destroy_process_group(self._group)


def join(
    store: Store, rank: int, size: int, *, generation: int = 0, timeout_s: float = 120.0
) -> GlooWorld:
    """Meets the other size - 1 processes through a store and makes their default process group.

    A process is in one such world at a time: `close` it before it joins the next generation.
    """
    dist.init_process_group(
        "gloo",
        store=PrefixStore(f"world{generation}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    group = dist.group.WORLD
    assert group is not None
    return GlooWorld(group, generation)


@contextmanager
def as_change() -> "Iterator[None]":
    """Gloo's RuntimeError about a peer as a `WorldChanged`."""
    try:
        yield
    except RuntimeError as error:
        raise WorldChanged(reason=str(error).partition("\n")[0]) from error
