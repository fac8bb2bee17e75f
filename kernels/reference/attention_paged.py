"""Attention of one new token per sequence over its pages (Kwon et al., 2023), in parts if asked.

A long context may be cut into `splits` parts that are attended to side by side and merged by their
log-sum-exp (Flash-Decoding, Dao et al., 2023). Pages and scales are those of kv_cache.py. This is
the oracle of the kernels; the decoder on the CPU runs reference/attention.py, whose bits are fixed.
"""

import torch

from kernels.reference.attention_prefill import attend
from kernels.reference.kv_cache import read_cache
from kernels.reference.precision import wide


def paged_attention(
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
) -> torch.Tensor:
    """q [S, H, D] over keys and values [pages, page_tokens, KH, D] -> [S, H, D] of q's dtype.

    page_tables [S, P] int32 names the pages of a sequence, context_tokens [S] int32 how many tokens
    they hold, the query's own among them: it sees the last `window` of them (all, if 0). What is
    outside of them is never read, entries of the table included. A context of 0 gives zeros. Query
    head h reads key head h // (H / KH). scale: of the scores, D ** -0.5 when None.
    """
    outs, lse = paged_attention_parts(
        q,
        keys,
        values,
        key_scales,
        value_scales,
        page_tables,
        context_tokens,
        window,
        splits,
        scale,
    )
    return merge_states(outs, lse)[0].to(q.dtype)


def paged_attention_parts(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts that `merge_states` joins: (outs [splits, S, H, D], lse [splits, S, H]), float32.

    How the visible tokens are divided among the parts is left to the implementation (here: evenly);
    a part without tokens has zeros and -inf.
    """
    exact = wide(q)
    outs = torch.zeros(splits, *q.shape, dtype=exact, device=q.device)
    lse = torch.full((splits, *q.shape[:2]), -torch.inf, dtype=exact, device=q.device)
    page_tokens = keys.shape[1]
    for sequence, context in enumerate(context_tokens.tolist()):
        first = max(context - window, 0) if window else 0
        size = -(-(context - first) // splits)
        for part in range(splits if size else 0):
            start, stop = first + part * size, min(first + (part + 1) * size, context)
            places = torch.arange(start, max(stop, start), device=q.device)
            slots = page_tables[sequence, places // page_tokens], places % page_tokens
            k = read_cache(keys[slots], None if key_scales is None else key_scales[slots], exact)
            v = read_cache(
                values[slots], None if value_scales is None else value_scales[slots], exact
            )
            seen = torch.ones(1, 1, len(places), dtype=torch.bool, device=q.device)
            out, part_lse = attend(q[sequence : sequence + 1], k, v, seen, scale)
            outs[part, sequence], lse[part, sequence] = out[0], part_lse[0]
    return outs, lse


def merge_states(outs: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """outs [n, S, H, D], lse [n, S, H] of n disjoint parts -> (out [S, H, D], lse [S, H]), as if
    they had been attended to together. Parts with -inf count for nothing, whatever outs has there;
    where all are, zeros and -inf."""
    exact = wide(outs, lse)
    together = lse.to(exact).logsumexp(0)
    shares = (lse.to(exact) - together.masked_fill(together == -torch.inf, 0)).exp()[..., None]
    # Zero times what an empty part may hold could be NaN. A NaN that was computed stays.
    weighted = torch.where(shares == 0, 0, outs.to(exact) * shares)
    return weighted.sum(0).to(outs.dtype), together.to(lse.dtype)
