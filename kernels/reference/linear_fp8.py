"""Products of float8 (e4m3fn) activations and weights with a scale per row and per channel.

The number format of Micikevicius et al. (2022). Devices without e4m3fn in hardware are refused by
the implementation that runs there.
"""

import torch

FP8 = torch.float8_e4m3fn


def fp8_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x e4m3fn [M, K], x_scales [M], w e4m3fn [N, K], w_scales [N] -> [M, N] of dtype.

    (x times transposed w) * x_scale * w_scale, summed in float32, rounded once. ValueError when x
    or w are of another type.
    """
    for name, given in (("x", x), ("w", w)):
        if given.dtype != FP8:
            raise ValueError(f"fp8_linear: {name} should be {FP8}, not {given.dtype}.")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    y = x.to(exact) @ w.to(exact).T
    return (y * x_scales.to(exact)[:, None] * w_scales.to(exact)).to(dtype)
