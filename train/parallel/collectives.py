"""Reduce-scatter and all-gather over a process group, at the cost that ZeRO counts with.

Gloo computes a reduce-scatter as an all-reduce, which sends twice as much as is needed; here every
rank sends each other one its share, and adds what it receives in the order of ranks, in float32 or
better. So (N - 1) / N of a buffer crosses the wire for each of the two operations, and sums have
the same bits however often they are made.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives:
    """The two operations in one process group of gloo; every rank calls them in the same order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """group: None for a world of one."""
        self.group = group
        self.rank = group.rank() if group is not None else 0
        self.size = group.size() if group is not None else 1

    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """flat: size * n elements; the sum over ranks of its rank-th n elements, a new tensor."""
        if self.group is None:
            return flat.clone()
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat, group=self.group)
        return added(received.view(self.size, -1))

    def all_gather(self, flat: Tensor) -> None:
        """flat: size * n elements, of which the rank-th n are this rank's; fills in the others'."""
        if self.group is None:
            return
        mine = flat.view(self.size, -1)[self.rank]
        dist.all_gather_into_tensor(flat, mine.clone(), group=self.group)

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, the same bits everywhere."""
        if self.group is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return float(total)


def added(shares: Tensor) -> Tensor:
    """The sum of the rows, from the first on, rounded once to their dtype."""
    wide = torch.float64 if shares.dtype == torch.float64 else torch.float32
    total = shares[0].to(wide, copy=True)
    for share in shares[1:]:
        total += share
    return total.to(shares.dtype)


class ExactReduceScatter:
    """FSDP2's reduce-scatter (`set_custom_reduce_scatter`) by the same exchange."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of FSDP2's."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """output_tensor: this rank's share of the sum; op must be a sum."""
        assert op == dist.ReduceOp.SUM, op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        output_tensor.copy_(added(received.view(group.size(), -1)))
