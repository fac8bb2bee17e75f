"""Products of int8 with int8 in int32, over activations that are quantised row by row.

The scheme of Dettmers et al. (2022) without outlier columns: absmax scaling of every row, and of
every output channel of the weight.
"""

import torch

from kernels.reference.precision import wide

LEVELS = 127
MAX_COLUMNS = (2**31 - 1) // (128 * 128)  # beyond it, an int32 sum of products might not hold


def quantize_rowwise_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (q int8 [M, K], scales float32 [M]) with x about q * scale.

    scale = absmax / 127 and q = x / scale, both divided in float32, q rounded half to even. A row
    of zeros has scale 0 and q 0.
    """
    exact = x.float()
    if x.shape[1] == 0:
        return torch.zeros_like(x, dtype=torch.int8), exact.new_zeros(x.shape[0])
    scales = exact.abs().amax(dim=1) / LEVELS
    divisors = torch.where(scales > 0, scales, torch.inf)[:, None]
    # A scale that is almost zero is itself rounded: the clamp is for its rows.
    q = (exact / divisors).round().clamp(-LEVELS, LEVELS)
    return q.to(torch.int8), scales


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a int8 [M, K], b int8 [N, K] -> a times transposed b, int32 [M, N], exact.

    ValueError when K is above 131071, where the largest sum would not fit.
    """
    if a.shape[1] > MAX_COLUMNS:
        raise ValueError(f"int8_matmul takes up to {MAX_COLUMNS} columns, not {a.shape[1]}.")
    # float64 holds every partial sum exactly, and its product is quick on any device.
    return (a.double() @ b.double().T).to(torch.int32)


def int8_linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    qweight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """q int8 [M, K], scales [M], qweight int8 [N, K], weight_scales [N] -> [M, N] of dtype.

    The exact int32 sums, times both scales, plus bias [N], rounded to dtype at the end.
    """
    exact = torch.float64 if dtype == torch.float64 else wide(scales, weight_scales, bias)
    sums = int8_matmul(q, qweight).to(exact)
    y = sums * scales.to(exact)[:, None] * weight_scales.to(exact)
    return (y if bias is None else y + bias.to(exact)).to(dtype)
