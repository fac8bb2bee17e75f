"""Paged attention: where keys and values are written, and how queries read them back.

One layer's cache is [2, pages, page_tokens, kv_heads, head_dim]: keys (rotated), then values. A
slot is page * page_tokens + offset. `plan_attention` runs once per step, `kv_write` and
`paged_attention` once per layer.

In float32 a row's result is the same, bit for bit, whatever else is in the batch and however its
sequence was cut into steps. Widths are fixed by `stable_width` for that, and what is masked must be
finite: the cache holds zeros before its first use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.reference.stable import IN_ORDER_WIDTH, stable_width


@dataclass(frozen=True)
class DecodeGroup:
    """Rows that are alone in their sequence and read about as far back.

    rows: their places in the batch, a slice when contiguous; pages [S * P] page numbers; mask
    [S, 1, 1, width], 0 where attended and -inf elsewhere.
    """

    rows: slice | torch.Tensor
    sequences: int
    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Several rows of one sequence. pages [P]; width: columns read; mask [1, 1, rows, width], or
    None when nothing precedes the segment and causal masking does."""

    rows: slice
    pages: torch.Tensor
    width: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """One step's reads, the same for every layer."""

    groups: tuple[DecodeGroup, ...]
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
    int64. A sequence without rows is skipped. dtype is that of the queries. All sequences with a
    single row are read together, in as many groups as there are widths (doubling from 512).
    """
    alone: dict[int, list[int]] = {}
    segments: list[Segment] = []
    for index, context in enumerate(context_tokens):
        start, stop = query_starts[index], query_starts[index + 1]
        assert 0 <= stop - start <= context <= page_tables.shape[1] * page_tokens
        if stop - start == 1:
            alone.setdefault(_width_class(context), []).append(index)
        elif stop > start:
            rows = slice(start, stop)
            segments.append(_segment(rows, context, page_tables[index], page_tokens, dtype))
    groups = tuple(
        _decode_group(members, query_starts, context_tokens, page_tables, page_tokens, dtype)
        for members in alone.values()
    )
    return AttentionPlan(groups, tuple(segments))


def _width_class(context: int) -> int:
    """Contexts of one class share a gather; classes double, so at most half of it is padding."""
    width = stable_width(context)
    return 0 if width <= IN_ORDER_WIDTH else 1 << (width - 1).bit_length()


def _segment(
    rows: slice, context: int, table: torch.Tensor, page_tokens: int, dtype: torch.dtype
) -> Segment:
    width, count = stable_width(context), rows.stop - rows.start
    pages = _read_pages(table[None], width, page_tokens)
    if count == context and width <= IN_ORDER_WIDTH:
        return Segment(rows, pages, width, None)
    first = context - count
    last = torch.arange(first, context, device=table.device)
    hidden = torch.arange(width, device=table.device)[None, :] > last[:, None]
    return Segment(rows, pages, width, _mask(hidden, dtype)[None, None])


def _decode_group(
    members: list[int],
    query_starts: Sequence[int],
    context_tokens: Sequence[int],
    page_tables: torch.Tensor,
    page_tokens: int,
    dtype: torch.dtype,
) -> DecodeGroup:
    device, count = page_tables.device, len(members)
    contexts = [context_tokens[index] for index in members]
    width = stable_width(max(contexts))
    places = [query_starts[index] for index in members]
    contiguous = places[-1] - places[0] == count - 1
    rows = slice(places[0], places[0] + count) if contiguous else torch.tensor(places).to(device)
    lengths = torch.tensor(contexts, device=device)[:, None]
    hidden = torch.arange(width, device=device)[None, :] >= lengths
    tables = page_tables if count == page_tables.shape[0] else page_tables[members]
    pages = _read_pages(tables, width, page_tokens)
    return DecodeGroup(rows, count, pages, _mask(hidden, dtype)[:, None, None, :])


def _mask(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shown = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return shown.masked_fill_(hidden, float("-inf"))


def _read_pages(tables: torch.Tensor, width: int, page_tokens: int) -> torch.Tensor:
    """The pages that hold width columns of each table, flat; page 0 stands in where a table ends
    (those columns are masked)."""
    wanted = -(-width // page_tokens)
    short = max(wanted - tables.shape[1], 0)
    return F.pad(tables[:, :wanted], (0, short)).reshape(-1)


def kv_write(
    kv_layer: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Stores keys and values [tokens, kv_heads, head_dim] at slots [tokens] of one layer."""
    flat = kv_layer.view(2, -1, *kv_layer.shape[3:])
    flat[0].index_copy_(0, slots, keys)
    flat[1].index_copy_(0, slots, values)


def paged_attention(
    queries: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, out: torch.Tensor
) -> None:
    """Causal attention of queries [tokens, heads, head_dim] into out, of the same shape.

    This step's own keys and values are already in kv_layer. Heads are grouped: query head h reads
    kv head h // (heads / kv_heads). Scores are scaled by head_dim ** -0.5.
    """
    for group in plan.groups:
        out[group.rows] = _attend_alone(queries[group.rows], kv_layer, group)
    for segment in plan.segments:
        out[segment.rows] = _attend_segment(queries[segment.rows], kv_layer, segment)


def _attend_alone(
    queries: torch.Tensor, kv_layer: torch.Tensor, group: DecodeGroup
) -> torch.Tensor:
    """queries [S, heads, head_dim]; the heads that share keys become the query axis, so keys and
    values are read as stored and never repeated."""
    kv_heads, head_dim = kv_layer.shape[3:]
    gathered = kv_layer.index_select(1, group.pages).view(
        2, group.sequences, -1, kv_heads, head_dim
    )
    keys, values = gathered[:, :, : group.mask.shape[-1]].transpose(2, 3)
    shared = queries.view(group.sequences, kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(shared, keys, values, attn_mask=group.mask)
    return attended.reshape(queries.shape)


def _attend_segment(
    queries: torch.Tensor, kv_layer: torch.Tensor, segment: Segment
) -> torch.Tensor:
    """queries [rows, heads, head_dim]."""
    gathered = kv_layer.index_select(1, segment.pages).view(2, -1, *kv_layer.shape[3:])
    keys, values = gathered[:, : segment.width].transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=segment.mask,
        is_causal=segment.mask is None,
        enable_gqa=queries.shape[1] != keys.shape[0],
    )
    return attended[0].transpose(0, 1)
