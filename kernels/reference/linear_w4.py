"""Products with weights of 4 bits in groups that have a scale and, if asymmetric, a minimum.

The layout is that of GGUF's blocks: in every run of 32 values, byte j of 16 holds value j in its
low nibble and value j + 16 in its high one, so such files are read without loss
(`gguf_split.from_gguf`). AWQ (Lin et al., 2023) is the asymmetric case with min = -zero * scale.
"""

import torch
import torch.nn.functional as F

from kernels.reference.precision import wide

RUN = 32  # values whose nibbles stand together in 16 bytes


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """values [..., n] of 0..15, n a multiple of 32 -> uint8 [..., n / 2] in the layout above."""
    low, high = torch.unflatten(values.to(torch.uint8), -1, (-1, 2, RUN // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """packed uint8 [..., n / 2] -> uint8 [..., n] of 0..15."""
    runs = torch.unflatten(packed, -1, (-1, RUN // 2))
    return torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2)


def dequantize_w4(
    qweight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """qweight uint8 [N, K / 2], scales and mins [N, K / G] float16 or float32 -> [N, K] of dtype.

    G is 32, 64 or 128. A weight is q * scale + min, or (q - 8) * scale when mins is None, in
    float32 (float64 when scales or dtype are), rounded once.
    """
    exact = torch.float64 if dtype == torch.float64 else wide(scales)
    groups = torch.unflatten(unpack_nibbles(qweight).to(exact), -1, (scales.shape[1], -1))
    if mins is None:
        weight = (groups - 8) * scales.to(exact)[..., None]
    else:
        weight = groups * scales.to(exact)[..., None] + mins.to(exact)[..., None]
    return weight.flatten(-2).to(dtype)


def w4_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] times the transposed weight of `dequantize_w4`, plus bias [N] -> [M, N] of x's
    dtype. Products are summed in float32 over weights that were not rounded to x's dtype."""
    exact = wide(x)
    weight = dequantize_w4(qweight, scales, mins, exact)
    return F.linear(x.to(exact), weight, None if bias is None else bias.to(exact)).to(x.dtype)
