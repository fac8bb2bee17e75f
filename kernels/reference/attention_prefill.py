"""Attention of whole sequences over themselves, side by side in one batch without padding.

With a window, the first `sink_tokens` of a sequence stay visible (Xiao et al., StreamingLLM, 2023).
`attend` is shared with the paged and the block-sparse reference.
"""

import torch

from kernels.reference.precision import wide


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    causal: bool = True,
    window: int = 0,
    sink_tokens: int = 0,
    scale: float | None = None,
    key_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, D], k and v [T, KH, D] (or [C, KH, D] with key_starts) -> [T, H, D].

    Sequence s is rows starts[s]..starts[s + 1] of starts [S + 1] int32, not decreasing; rows
    outside every sequence give zeros. Query head h reads key head h // (H / KH). Position i sees
    j <= i (any j if not causal) with |i - j| < window unless window is 0, and always, if causality
    lets it, j < sink_tokens. scale: of the scores, D ** -0.5 when None.

    key_starts [S + 1] int32: where the keys of a sequence are, if it has more than queries; those
    are then its last tokens, as of a prompt that is computed in chunks. A sequence has as many keys
    as queries, or more.
    """
    out = torch.zeros_like(q)
    bounds = starts.tolist()
    places = bounds if key_starts is None else key_starts.tolist()
    for start, stop, first, last in zip(bounds, bounds[1:], places, places[1:], strict=False):
        seen = visible(last - first, causal, window, sink_tokens, q.device)
        rows, keys = slice(start, stop), slice(first, last)
        seen = seen[last - first - (stop - start) :]
        out[rows] = attend(q[rows], k[keys], v[keys], seen, scale)[0].to(q.dtype)
    return out


def visible(
    tokens: int, causal: bool, window: int, sink_tokens: int, device: torch.device
) -> torch.Tensor:
    """bool [tokens, tokens]: whether query i sees key j."""
    query = torch.arange(tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)[None, :]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if window:
        seen &= ((query - key).abs() < window) | (key < sink_tokens)
    if causal:
        seen &= key <= query
    return seen


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [C, KH, D], seen bool, broadcast to [H, T, C].

    (out [T, H, D], lse [T, H]: the logarithm of the sum of exponentiated scores), in float32 or
    float64. A row that sees nothing has zeros and -inf.
    """
    exact = wide(q)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    keys = k.to(exact).repeat_interleave(group, dim=1)
    values = v.to(exact).repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,chd->htc", q.to(exact), keys) * factor
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[0] else scores.new_full(scores.shape[:2], -torch.inf)
    # exp(-inf - -inf) is NaN, and such a row is to be zero.
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("htc,chd->thd", probabilities, values), lse.T.contiguous()
