"""DeepSpeed-Ulysses (Jacobs et al. 2023): ranks share a sequence; for attention they change over to
sharing heads, and back.

One all-to-all turns (all heads of some tokens) into (some heads of all tokens). Each of the four
tensors of attention crosses once each way, whatever the sequence's length per rank: 4 N h / P
values, of which a rank keeps one in P.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Causal attention over a sequence of which each rank holds consecutive tokens, by rank.

    query (batch, heads, local_tokens, head_dim), key and value with as many heads or a divisor;
    out as query. Called by all ranks. ValueError when heads cannot be shared out.
    """
    size = group.size() if group is not None else 1
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % size:
        raise ValueError(
            f"{size} ranks cannot share {heads} heads of attention; mesh.sequence may be a divisor "
            f"of {heads}, or use ring attention"
        )
    if kv_heads % size:
        key, value = (_repeated(x, size) for x in (key, value))
    query, key, value = (_exchange(x, 1, 2, group) for x in (query, key, value))
    gqa = key.shape[1] != query.shape[1]
    mixed = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=gqa
    )
    return _exchange(mixed, 2, 1, group)


def _repeated(x: Tensor, size: int) -> Tensor:
    """Heads so often that every rank gets whole ones that its queries read."""
    kv_heads = x.shape[1]
    if size % kv_heads:
        raise ValueError(
            f"{size} ranks cannot share {kv_heads} heads of keys; mesh.sequence may be a divisor "
            f"or a multiple of {kv_heads}"
        )
    return x.repeat_interleave(size // kv_heads, 1)


def _exchange(x: Tensor, cut: int, joined: int, group: dist.ProcessGroup | None) -> Tensor:
    """x, cut along one dimension by rank, and what comes from all ranks joined along another."""
    if group is None or group.size() == 1:
        return x
    out: Tensor = _AllToAll.apply(x, cut, joined, group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way = cut, joined, group
        parts = torch.stack(x.chunk(group.size(), cut))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(list(received), joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cut, joined, group = ctx.way
        return _AllToAll.forward(ctx, grads[0], joined, cut, group), None, None, None
