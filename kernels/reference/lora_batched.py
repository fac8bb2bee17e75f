"""Low-rank adapters (Hu et al., 2021), a different one for each row of a batch.

The segmented gather product of Punica (Chen et al., 2023): one call for all adapters of a step.
"""

import torch

from kernels.reference.precision import wide


def sgmv(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapters: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """x [T, K], a [L, r, K], b [L, N, r], adapters [T] int64, scaling [L] -> [T, N] of x's dtype.

    Row t is scaling * b (a x) of its adapter; exactly 0 where adapters[t] is -1. What lies between
    a and b stays in float32.
    """
    exact = wide(x)
    out = x.new_zeros(x.shape[0], b.shape[1])
    for adapter in range(a.shape[0]):
        rows = (adapters == adapter).nonzero()[:, 0]
        inner = x[rows].to(exact) @ a[adapter].to(exact).T
        outer = inner @ b[adapter].to(exact).T
        out[rows] = (outer * scaling[adapter].to(exact)).to(x.dtype)
    return out
