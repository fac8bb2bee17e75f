"""`paged_attention` and `merge_states`: one new token of each sequence over its pages.

See reference/attention_paged.py.
"""

import torch

from kernels.ops import checks
from kernels.ops.define import Out, define
from kernels.ops.kv_cache import cached_shape
from kernels.reference import attention_paged as reference


def _paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    page_tables: torch.Tensor,
    context_tokens: torch.Tensor,
    window: int = 0,
    splits: int = 1,
    scale: float | None = None,
) -> Out:
    op = "paged_attention"
    checks.dims(f"{op}: q", q, "[S, H, D]")
    checks.dtype(f"{op}: q", q, checks.FLOATS)
    cached = cached_shape(op, "keys", keys, key_scales)
    checks.need(
        cached_shape(op, "values", values, value_scales) == cached and keys.dtype == values.dtype,
        f"{op}: keys and values should have the same shape and dtype.",
    )
    checks.shape(f"{op}: q", q, q.shape[0], q.shape[1], cached[3])
    checks.heads(op, q, cached[2])
    checks.dims(f"{op}: page_tables", page_tables, "[S, P]")
    checks.shape(f"{op}: page_tables", page_tables, q.shape[0], page_tables.shape[1])
    checks.shape(f"{op}: context_tokens", context_tokens, q.shape[0])
    checks.dtype(f"{op}: page_tables", page_tables, (torch.int32,))
    checks.dtype(f"{op}: context_tokens", context_tokens, (torch.int32,))
    checks.need(
        window >= 0 and splits >= 1,
        f"{op}: window ({window}) should be 0 or more, splits ({splits}) 1 or more.",
    )
    return Out(q.shape, q.dtype)


def _merge(outs: torch.Tensor, lse: torch.Tensor) -> tuple[Out, Out]:
    checks.dims("merge_states: outs", outs, "[n, S, H, D]")
    checks.shape("merge_states: lse", lse, *outs.shape[:3])
    checks.dtype("merge_states: outs", outs, checks.FLOATS)
    checks.dtype("merge_states: lse", lse, (torch.float32, torch.float64))
    checks.need(outs.shape[0] > 0, "merge_states: there should be one part at least.")
    return Out(outs.shape[1:], outs.dtype), Out(lse.shape[1:], lse.dtype)


paged_attention = define(reference.paged_attention, _paged, "attention_paged")
merge_states = define(reference.merge_states, _merge, "attention_paged")
