"""Products with weights of 8 bits in groups that have a scale.

Groups of 32 are GGUF's Q8_0, of 16 its Q6_K (six bits, kept in a byte each); one group of all K
is the per-channel case.
"""

import torch
import torch.nn.functional as F

from kernels.reference.precision import wide


def dequantize_w8(qweight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """qweight int8 [N, K], scales [N, K / G] -> q * scale, [N, K] of dtype.

    G is 16, 32, 64, 128 or K. Computed in float32 (float64 when scales or dtype are), rounded once.
    """
    exact = torch.float64 if dtype == torch.float64 else wide(scales)
    groups = torch.unflatten(qweight.to(exact), -1, (scales.shape[1], -1))
    return (groups * scales.to(exact)[..., None]).flatten(-2).to(dtype)


def w8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] times the transposed weight of `dequantize_w8`, plus bias [N] -> [M, N] of x's
    dtype. Products are summed in float32 over weights that were not rounded to x's dtype."""
    exact = wide(x)
    weight = dequantize_w8(qweight, scales, exact)
    return F.linear(x.to(exact), weight, None if bias is None else bias.to(exact)).to(x.dtype)
