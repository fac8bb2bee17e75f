"""`nm_linear`, and `nm_pack`, which is no op: it runs once, where a model is pruned."""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import linear_nm as reference
from kernels.reference.linear_nm import nm_pack

__all__ = ["nm_linear", "nm_pack"]


def _linear(x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, n: int, m: int) -> Out:
    op = "nm_linear"
    checks.need(1 <= n <= m <= 256, f"{op}: {n}:{m} is no pattern; 1 <= n <= m <= 256 is.")
    checks.dims(f"{op}: x", x, "[M, K]")
    checks.dims(f"{op}: values", values, "[N, K / m * n]")
    checks.need(x.shape[1] % m == 0, f"{op}: {x.shape[1]} columns are no multiple of {m}.")
    checks.shape(f"{op}: values", values, values.shape[0], x.shape[1] // m * n)
    checks.shape(f"{op}: indices", indices, *values.shape)
    checks.dtype(f"{op}: x", x, checks.FLOATS)
    checks.dtype(f"{op}: values", values, checks.FLOATS)
    checks.dtype(f"{op}: indices", indices, (torch.uint8,))
    return Out((x.shape[0], values.shape[0]), x.dtype)


nm_linear = define(reference.nm_linear, _linear, "linear_nm")
