"""`quantize_rowwise_int8`, `int8_matmul`, `int8_linear`. See reference/linear_int8.py."""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import linear_int8 as reference


def _quantize(x: torch.Tensor) -> tuple[Out, Out]:
    checks.dims("quantize_rowwise_int8: x", x, "[M, K]")
    checks.dtype("quantize_rowwise_int8: x", x, checks.FLOATS)
    return Out(x.shape, torch.int8), Out((x.shape[0],), torch.float32)


def _product(op: str, a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    checks.dims(f"{op}: the activation", a, "[M, K]")
    checks.dims(f"{op}: the weight", b, "[N, K]")
    checks.dtype(f"{op}: the activation", a, (torch.int8,))
    checks.dtype(f"{op}: the weight", b, (torch.int8,))
    checks.shape(f"{op}: the weight", b, b.shape[0], a.shape[1])
    checks.need(
        a.shape[1] <= reference.MAX_COLUMNS,
        f"{op} takes up to {reference.MAX_COLUMNS} columns, not {a.shape[1]}.",
    )
    return a.shape[0], b.shape[0]


def _matmul(a: torch.Tensor, b: torch.Tensor) -> Out:
    return Out(_product("int8_matmul", a, b), torch.int32)


def _linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    qweight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Out:
    rows, columns = _product("int8_linear", q, qweight)
    checks.shape("int8_linear: scales", scales, rows)
    checks.shape("int8_linear: weight_scales", weight_scales, columns)
    checks.dtype("int8_linear: scales", scales, checks.FLOATS)
    checks.dtype("int8_linear: weight_scales", weight_scales, checks.FLOATS)
    checks.bias("int8_linear", bias, columns)
    checks.out_dtype("int8_linear", dtype)
    return Out((rows, columns), dtype)


quantize_rowwise_int8 = define(reference.quantize_rowwise_int8, _quantize, "linear_int8")
int8_matmul = define(reference.int8_matmul, _matmul, "linear_int8")
int8_linear = define(reference.int8_linear, _linear, "linear_int8")
