"""`sample`: the next token of every row. See reference/sampling.py."""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import sampling as reference


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> Out:
    checks.dims("sample: logits", logits, "[R, V]")
    checks.dtype("sample: logits", logits, checks.FLOATS)
    rows, tokens = logits.shape
    checks.need(tokens > 0, "sample: there should be one token at least to choose from.")
    for name, given in (("temperature", temperature), ("top_p", top_p)):
        checks.shape(f"sample: {name}", given, rows)
        checks.dtype(f"sample: {name}", given, checks.FLOATS)
    checks.shape("sample: uniform", uniform, rows)
    checks.dtype("sample: uniform", uniform, (torch.float32,))
    checks.shape("sample: top_k", top_k, rows)
    checks.dtype("sample: top_k", top_k, checks.INTEGERS)
    return Out((rows,), torch.int64)


sample = define(reference.sample, _sample, "sampling")
