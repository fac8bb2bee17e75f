"""Products with weights of which n of every m neighbours are kept (2:4 and its like).

The pattern of Mishra et al. (2021). Only the kept values and their places are stored.
"""

import torch
import torch.nn.functional as F

from kernels.reference.precision import wide


def nm_pack(weight: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K], K a multiple of m -> (values [N, K / m * n], indices uint8 of that shape).

    The n largest by magnitude of every m, in the order they stand in; of equals, the first. An
    index is a place within its m, which is at most 256.
    """
    groups = torch.unflatten(weight, -1, (-1, m))
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
    indices = order[..., :n].sort(dim=-1).values
    return groups.gather(-1, indices).flatten(-2), indices.to(torch.uint8).flatten(-2)


def nm_unpack(values: torch.Tensor, indices: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """What `nm_pack` packed, with zeros where nothing was kept: [N, K]."""
    kept = torch.unflatten(values, -1, (-1, n))
    dense = kept.new_zeros(*kept.shape[:-1], m)
    dense.scatter_(-1, torch.unflatten(indices, -1, (-1, n)).long(), kept)
    return dense.flatten(-2)


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, n: int, m: int
) -> torch.Tensor:
    """x [M, K] times the transposed weight of `nm_unpack` -> [M, N], summed in float32."""
    exact = wide(x)
    return F.linear(x.to(exact), nm_unpack(values.to(exact), indices, n, m)).to(x.dtype)
