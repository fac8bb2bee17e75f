"""The collectives that compressors use, over a run's world, with every byte that leaves counted.

Counted is what a rank sends to others by gloo's algorithms: a ring all-reduce sends a tensor
2 (N - 1) / N times, an all-gather N - 1 times, an all-to-all (N - 1) / N times.
tests/train/communication compares the counts with the kernel's of its connections.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from train.world import World, as_change


class Transport:
    """One rank's. sent_bytes: by this rank so far. size, rank: the world's."""

    def __init__(self, world: World) -> None:
        self.world, self.rank, self.size = world, world.rank, world.size
        self.sent_bytes = 0

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over ranks, in place, the same bits everywhere."""
        self.world.all_reduce(tensor)
        self.count(dense_bytes(tensor.nbytes, self.size))

    def all_gather(self, payload: Tensor) -> list[Tensor]:
        """Everybody's payload, by rank; all of one shape and dtype."""
        gathered = self.world.all_gather(payload)
        self.count((self.size - 1) * payload.nbytes)
        return gathered

    def all_to_all(self, payloads: Tensor) -> Tensor:
        """payloads: (ranks, bytes), row r for rank r. Rows by the rank that sent them."""
        received = torch.empty_like(payloads)
        group = self.world.group
        assert group is not None, "a world of several has a process group"
        with as_change():
            dist.all_to_all_single(received, payloads, group=group)
        self.count(payloads.nbytes * (self.size - 1) // self.size)
        return received

    def count(self, sent: int) -> None:
        """Notes bytes that this rank sent."""
        self.sent_bytes += sent


def dense_bytes(tensor_bytes: int, size: int) -> int:
    """What a rank sends when a tensor of so many bytes is summed over `size` ranks in a ring."""
    return 2 * tensor_bytes * (size - 1) // size
