"""`w4_linear` and `dequantize_w4`: weights of 4 bits. See reference/linear_w4.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import linear_w4 as reference

GROUPS = (32, 64, 128)


def _weight(
    op: str, qweight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None
) -> tuple[int, int]:
    """The shape [N, K] of the weight."""
    checks.dims(f"{op}: qweight", qweight, "[N, K / 2]")
    checks.dtype(f"{op}: qweight", qweight, (torch.uint8,))
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    checks.dims(f"{op}: scales", scales, "[N, K / G]")
    checks.dtype(f"{op}: scales", scales, checks.SCALES)
    checks.need(
        any(scales.shape[1] * group == columns for group in GROUPS) and scales.shape[0] == rows,
        f"{op}: scales {list(scales.shape)} of a weight [{rows}, {columns}] should have one for "
        "each group of 32, 64 or 128 columns.",
    )
    if mins is not None:
        checks.shape(f"{op}: mins", mins, *scales.shape)
        checks.dtype(f"{op}: mins", mins, checks.SCALES)
    return rows, columns


def _dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None, dtype: torch.dtype
) -> Out:
    checks.out_dtype("dequantize_w4", dtype)
    return Out(_weight("dequantize_w4", qweight, scales, mins), dtype)


def _linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> Out:
    rows, columns = _weight("w4_linear", qweight, scales, mins)
    checks.dims("w4_linear: x", x, "[M, K]")
    checks.dtype("w4_linear: x", x, checks.FLOATS)
    checks.shape("w4_linear: x", x, x.shape[0], columns)
    checks.bias("w4_linear", bias, rows)
    return Out((x.shape[0], rows), x.dtype)


dequantize_w4 = define(reference.dequantize_w4, _dequantize, "linear_w4")
w4_linear = define(reference.w4_linear, _linear, "linear_w4")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, qweight, scales, mins, bias = inputs
    ctx.save_for_backward(qweight, scales, mins)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The weight is rounded to the gradient's dtype; it has no gradient itself."""
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        qweight, scales, mins = ctx.saved_tensors
        x_grad = grad @ dequantize_w4(qweight, scales, mins, grad.dtype)
    # A bias that was left out has no place in needs_input_grad.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        bias_grad = grad.sum(0, dtype=ctx.bias_dtype)
    return x_grad, None, None, None, bias_grad


register_autograd(w4_linear, _save, _backward)
