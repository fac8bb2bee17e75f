"""`prefill_attention`: sequences over themselves. See reference/attention_prefill.py."""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.reference import attention_prefill as reference


def self_attention(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int | None = None
) -> Out:
    """Checks q [T, H, D], k and v [keys, KH, D] against each other; keys is T when None."""
    checks.dims(f"{op}: q", q, "[T, H, D]")
    checks.dims(f"{op}: k", k, "[T, KH, D]")
    checks.shape(f"{op}: k", k, q.shape[0] if keys is None else keys, k.shape[1], q.shape[2])
    checks.shape(f"{op}: v", v, *k.shape)
    checks.heads(op, q, k.shape[1])
    checks.dtype(f"{op}: q", q, checks.FLOATS)
    checks.dtype(f"{op}: k", k, (q.dtype,))
    checks.dtype(f"{op}: v", v, (q.dtype,))
    return Out(q.shape, q.dtype)


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    causal: bool = True,
    window: int = 0,
    sink_tokens: int = 0,
    scale: float | None = None,
    key_starts: torch.Tensor | None = None,
) -> Out:
    checks.dims("prefill_attention: starts", starts, "[S + 1]")
    checks.dtype("prefill_attention: starts", starts, (torch.int32,))
    checks.need(
        window >= 0 and sink_tokens >= 0,
        f"prefill_attention: window ({window}) and sink_tokens ({sink_tokens}) should not be "
        "negative; 0 is none.",
    )
    if key_starts is None:
        return self_attention("prefill_attention", q, k, v)
    checks.shape("prefill_attention: key_starts", key_starts, starts.shape[0])
    checks.dtype("prefill_attention: key_starts", key_starts, (torch.int32,))
    checks.dims("prefill_attention: k", k, "[C, KH, D]")
    return self_attention("prefill_attention", q, k, v, keys=k.shape[0])


prefill_attention = define(reference.prefill_attention, _prefill, "attention_prefill")
