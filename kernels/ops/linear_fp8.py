"""`fp8_linear`: activations and weights of 8 bits (e4m3fn). See reference/linear_fp8.py."""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import linear_fp8 as reference


def _linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype,
) -> Out:
    checks.dims("fp8_linear: x", x, "[M, K]")
    checks.dims("fp8_linear: w", w, "[N, K]")
    checks.dtype("fp8_linear: x", x, (reference.FP8,))
    checks.dtype("fp8_linear: w", w, (reference.FP8,))
    checks.shape("fp8_linear: w", w, w.shape[0], x.shape[1])
    checks.shape("fp8_linear: x_scales", x_scales, x.shape[0])
    checks.shape("fp8_linear: w_scales", w_scales, w.shape[0])
    checks.dtype("fp8_linear: x_scales", x_scales, checks.FLOATS)
    checks.dtype("fp8_linear: w_scales", w_scales, checks.FLOATS)
    checks.out_dtype("fp8_linear", dtype)
    return Out((x.shape[0], w.shape[0]), dtype)


fp8_linear = define(reference.fp8_linear, _linear, "linear_fp8")
