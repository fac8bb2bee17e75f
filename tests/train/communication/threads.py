"""Ranks as threads of one process: a world and a transport for tests that need no gloo."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.communication.transport import Transport


class Table:
    """Where `size` threads lay down values and pick up everybody's."""

    def __init__(self, size: int):
        self.size, self.values = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=100)

    def share(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadWorld:
    """A `World` of threads."""

    group: dist.ProcessGroup | None = None
    generation = 0

    def __init__(self, table: Table, rank: int):
        self.table, self.rank, self.size = table, rank, table.size

    def all_reduce(self, tensor: Tensor) -> None:
        found = self.table.share(self.rank, tensor.clone())
        tensor.copy_(torch.stack(found).sum(0))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.table.share(self.rank, tensor.clone())[source])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return self.table.share(self.rank, tensor.clone())

    def send(self, tensor: Tensor, to: int) -> None:
        raise AssertionError("a sum over workers sends to nobody alone")

    def recv(self, tensor: Tensor, source: int) -> None:
        raise AssertionError("a sum over workers hears from nobody alone")

    def barrier(self) -> None:
        self.table.barrier.wait()


class ThreadTransport(Transport):
    """The counting transport, whose one operation beside the world's goes over the table."""

    def all_to_all(self, payloads: Tensor) -> Tensor:
        found = self.world.all_gather(payloads)
        self.count(payloads.nbytes * (self.size - 1) // self.size)
        return torch.stack([rows[self.rank] for rows in found])


def on_threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on every rank; results by rank."""
    table = Table(size)

    def one(rank: int) -> Any:
        try:
            return function(ThreadWorld(table, rank), *arguments)
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
