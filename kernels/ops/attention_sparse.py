"""`block_sparse_attention`: a mask of blocks. See reference/attention_sparse.py."""

import torch

from kernels.ops import checks
from kernels.ops.attention_prefill import self_attention
from kernels.ops.define import Out, define
from kernels.reference import attention_sparse as reference


def _sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> Out:
    op = "block_sparse_attention"
    out = self_attention(op, q, k, v)
    checks.need(block >= 1, f"{op}: a block has 1 token or more, not {block}.")
    blocks = -(-q.shape[0] // block)
    checks.shape(f"{op}: block_mask", block_mask, q.shape[1], blocks, blocks)
    checks.dtype(f"{op}: block_mask", block_mask, (torch.bool,))
    return out


block_sparse_attention = define(reference.block_sparse_attention, _sparse, "attention_sparse")
