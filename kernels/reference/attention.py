"""Paged attention: where keys and values are written, and how queries read them back.

One layer's cache is [2, pages, page_tokens, kv_heads, head_dim]: keys (rotated), then values. A
slot is page * page_tokens + offset. `plan_attention` runs once per step, `kv_write` and
`paged_attention` once per layer. All sequences with a single query share one batched SDPA;
every longer segment gets one of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class DecodeRows:
    """The rows that are alone in their sequence.

    rows: their positions in the batch, a slice when contiguous; pages [S * P] flat page numbers;
    mask [S, 1, 1, P * page_tokens], 0 where attended and -inf elsewhere.
    """

    rows: slice | torch.Tensor
    sequences: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Several rows start..stop of one sequence. pages and mask are None when nothing precedes
    the segment; else pages [P] and mask [1, 1, stop - start, P * page_tokens]."""

    start: int
    stop: int
    pages: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """One step's reads, the same for every layer."""

    decode: DecodeRows | None
    segments: tuple[Segment, ...]


def plan_attention(
    query_starts: Sequence[int],
    context_tokens: Sequence[int],
    page_tables: torch.Tensor,
    page_tokens: int,
    dtype: torch.dtype,
) -> AttentionPlan:
    """The plan for S sequences with rows query_starts[s]..query_starts[s + 1].

    context_tokens[s] counts the tokens of sequence s after this step; page_tables [S, max_pages]
    int64. A sequence without rows is skipped. dtype is that of the queries.
    """
    alone: list[int] = []
    segments: list[Segment] = []
    for index, context in enumerate(context_tokens):
        start, stop = query_starts[index], query_starts[index + 1]
        assert 0 <= stop - start <= context <= page_tables.shape[1] * page_tokens
        if stop - start == 1:
            alone.append(index)
        elif stop - start == context:
            segments.append(Segment(start, stop, None, None))
        elif stop > start:
            pages = page_tables[index, : -(-context // page_tokens)]
            mask = _causal_mask(stop - start, context, pages.numel() * page_tokens, dtype, pages)
            segments.append(Segment(start, stop, pages, mask))
    decode = None
    if alone:
        decode = _plan_decode(alone, query_starts, context_tokens, page_tables, page_tokens, dtype)
    return AttentionPlan(decode, tuple(segments))


def _causal_mask(
    rows: int, context: int, columns: int, dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """[1, 1, rows, columns]; row r is at position context - rows + r and sees 0..itself."""
    last = torch.arange(context - rows, context, device=like.device)[:, None]
    hidden = torch.arange(columns, device=like.device)[None, :] > last
    mask = torch.zeros(rows, columns, dtype=dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))[None, None]


def _plan_decode(
    alone: list[int],
    query_starts: Sequence[int],
    context_tokens: Sequence[int],
    page_tables: torch.Tensor,
    page_tokens: int,
    dtype: torch.dtype,
) -> DecodeRows:
    device = page_tables.device
    contexts = [context_tokens[index] for index in alone]
    width = -(-max(contexts) // page_tokens)
    first, count = query_starts[alone[0]], len(alone)
    if query_starts[alone[-1]] == first + count - 1:
        rows: slice | torch.Tensor = slice(first, first + count)
    else:
        rows = torch.tensor([query_starts[index] for index in alone], device=device)
    lengths = torch.tensor(contexts, device=device)[:, None]
    hidden = torch.arange(width * page_tokens, device=device)[None, :] >= lengths
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]
    tables = page_tables if count == page_tables.shape[0] else page_tables[alone]
    return DecodeRows(rows, count, tables[:, :width].reshape(-1), mask)


def kv_write(
    kv_layer: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Stores keys and values [tokens, kv_heads, head_dim] at slots [tokens] of one layer."""
    flat = kv_layer.view(2, -1, *kv_layer.shape[3:])
    flat[0].index_copy_(0, slots, keys)
    flat[1].index_copy_(0, slots, values)


def paged_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
) -> torch.Tensor:
    """Causal attention of queries [tokens, heads, head_dim] -> the same shape.

    keys and values [tokens, kv_heads, head_dim] are this step's own, already written to
    kv_layer; a segment that starts its sequence reads them directly. Heads are grouped: query
    head h reads kv head h // (heads / kv_heads). Scores are scaled by head_dim ** -0.5.
    """
    out = torch.empty_like(queries)
    if plan.decode is not None:
        rows = plan.decode.rows
        out[rows] = _attend_decode(queries[rows], kv_layer, plan.decode)
    for segment in plan.segments:
        rows = slice(segment.start, segment.stop)
        if segment.pages is None:
            read, written = keys[rows], values[rows]
        else:
            pages = kv_layer.index_select(1, segment.pages)
            read, written = pages.view(2, -1, *kv_layer.shape[3:])
        out[rows] = F.scaled_dot_product_attention(
            queries[rows].transpose(0, 1)[None],
            read.transpose(0, 1)[None],
            written.transpose(0, 1)[None],
            attn_mask=segment.mask,
            is_causal=segment.mask is None,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )[0].transpose(0, 1)
    return out


def _attend_decode(
    queries: torch.Tensor, kv_layer: torch.Tensor, decode: DecodeRows
) -> torch.Tensor:
    """queries [S, heads, head_dim]; a group of heads that share keys becomes the query axis,
    so keys and values are read as stored and never repeated."""
    kv_heads, head_dim = kv_layer.shape[3:]
    gathered = kv_layer.index_select(1, decode.pages)
    keys, values = gathered.view(2, decode.sequences, -1, kv_heads, head_dim).transpose(2, 3)
    grouped = queries.reshape(decode.sequences, kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=decode.mask)
    return attended.reshape(queries.shape)
