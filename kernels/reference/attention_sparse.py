"""Attention where a mask says which blocks of keys a block of queries reads.

What Longformer (Beltagy et al., 2020) and BigBird (Zaheer et al., 2020) come down to: their
patterns are block masks.
"""

import torch

from kernels.reference.attention_prefill import attend, visible


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """q [T, H, D], k and v [T, KH, D], one sequence -> [T, H, D].

    block_mask bool [H, ceil(T / block), ceil(T / block)]: whether queries of block i of that query
    head read keys of block j; causality holds inside blocks too. A row that sees nothing gives
    zeros. scale: of the scores, D ** -0.5 when None.
    """
    tokens = q.shape[0]
    spread = block_mask.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    seen = spread[:, :tokens, :tokens] & visible(tokens, causal, 0, 0, q.device)
    return attend(q, k, v, seen, scale)[0].to(q.dtype)
