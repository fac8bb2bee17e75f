"""`w8_linear` and `dequantize_w8`: weights of 8 bits. See reference/linear_w8.py."""

from typing import Any

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define, register_autograd
from kernels.reference import linear_w8 as reference

GROUPS = (16, 32, 64, 128)


def _weight(op: str, qweight: torch.Tensor, scales: torch.Tensor) -> tuple[int, int]:
    """The shape [N, K] of the weight."""
    checks.dims(f"{op}: qweight", qweight, "[N, K]")
    checks.dtype(f"{op}: qweight", qweight, (torch.int8,))
    rows, columns = qweight.shape
    checks.dims(f"{op}: scales", scales, "[N, K / G]")
    checks.dtype(f"{op}: scales", scales, checks.SCALES)
    grouped = any(scales.shape[1] * group == columns for group in (*GROUPS, columns))
    checks.need(
        grouped and scales.shape[0] == rows,
        f"{op}: scales {list(scales.shape)} of a weight [{rows}, {columns}] should have one for "
        "each group of 16, 32, 64, 128 or all columns.",
    )
    return rows, columns


def _dequantize(qweight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Out:
    checks.out_dtype("dequantize_w8", dtype)
    return Out(_weight("dequantize_w8", qweight, scales), dtype)


def _linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Out:
    rows, columns = _weight("w8_linear", qweight, scales)
    checks.dims("w8_linear: x", x, "[M, K]")
    checks.dtype("w8_linear: x", x, checks.FLOATS)
    checks.shape("w8_linear: x", x, x.shape[0], columns)
    checks.bias("w8_linear", bias, rows)
    return Out((x.shape[0], rows), x.dtype)


dequantize_w8 = define(reference.dequantize_w8, _dequantize, "linear_w8")
w8_linear = define(reference.w8_linear, _linear, "linear_w8")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, qweight, scales, bias = inputs
    ctx.save_for_backward(qweight, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The weight is rounded to the gradient's dtype; it has no gradient itself."""
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        qweight, scales = ctx.saved_tensors
        x_grad = grad @ dequantize_w8(qweight, scales, grad.dtype)
    # A bias that was left out has no place in needs_input_grad.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        bias_grad = grad.sum(0, dtype=ctx.bias_dtype)
    return x_grad, None, None, bias_grad


register_autograd(w8_linear, _save, _backward)
