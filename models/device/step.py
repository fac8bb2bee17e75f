"""What one step computes, on the device: rows that each read pages, and chunks of prompts.

A row reads all of its context from pages, however many rows its sequence has in the step; that is
what a decode step is made of, and its shape does not depend on lengths. A chunk's rows share what
they read: its context is gathered once and attended to in blocks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from models.batch import TokenBatch

TABLE_COLUMNS = 16  # tables are whole multiples wide: their stride then compiles one way only
MOST_SPLITS = 32
PROGRAMS_PER_UNIT = 2
LEAST_PART_TOKENS = 256


CacheLayer = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Numbers of keys and of values, scales of keys and of values."""


class Cache(NamedTuple):
    """numbers [layers, 2, pages, page_tokens, KH, n] and scales [layers, 2, pages, page_tokens, KH,
    ...], None where there are none: as kernels.kv_planes has them. [l, 0] are keys, [l, 1]
    values. In int4 the last bytes of a head of values are float16 scales of its groups, then those
    of the key."""

    numbers: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def page_tokens(self) -> int:
        return self.numbers.shape[3]

    def layers(self) -> Iterator[CacheLayer]:
        """Each layer's part, as `kv_write` and `paged_attention` take it."""
        numbers, scales = self.numbers, self.scales
        if numbers.dtype != torch.uint8:
            for layer, both in enumerate(numbers):
                scale = (None, None) if scales is None else (scales[layer, 0], scales[layer, 1])
                yield both[0], both[1], *scale
            return
        nibble_bytes = numbers.shape[-1] * 4 // 5
        behind = numbers[:, 1, ..., nibble_bytes:].view(torch.float16)
        groups = behind.shape[-1] // 2
        for both, scale in zip(numbers, behind, strict=True):
            yield both[0], both[1, ..., :nibble_bytes], scale[..., groups:], scale[..., :groups]


class PagedRows(NamedTuple):
    """rows [n] int64: which of the step's, None for all. tables [n, P] int32, contexts [n] int32:
    pages of each row, and how many tokens it sees. splits: parts of a context."""

    rows: torch.Tensor | None
    tables: torch.Tensor
    contexts: torch.Tensor
    splits: int


class Chunks(NamedTuple):
    """rows as in PagedRows; starts and key_starts [S + 1] int32 as prefill_attention takes them.
    key_slots [C] int64: where the keys of all sequences are in the cache."""

    rows: torch.Tensor | None
    starts: torch.Tensor
    key_starts: torch.Tensor
    key_slots: torch.Tensor


class Step(NamedTuple):
    """ids, positions, slots [N] int64 as in TokenBatch, a negative slot for a row that nobody
    reads. Every row is in `paged` or in `chunks`."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    paged: PagedRows | None
    chunks: Chunks | None


class Sizes(NamedTuple):
    """What the number of splits depends on: key heads, and multiprocessors (0: not split)."""

    kv_heads: int
    units: int

    def splits(self, rows: int, longest_tokens: int) -> int:
        """So many that there are some programs for each multiprocessor, none with few tokens."""
        wanted = -(-PROGRAMS_PER_UNIT * self.units // max(rows * self.kv_heads, 1))
        return max(1, min(wanted, longest_tokens // LEAST_PART_TOKENS, MOST_SPLITS))


def step_of(batch: TokenBatch, page_tokens: int, sizes: Sizes, device: torch.device) -> Step:
    """The batch on the device: sequences with one row read pages, those with more are chunks."""
    counts = torch.tensor(batch.query_starts).diff()
    single = counts == 1
    return Step(
        batch.ids.to(device),
        batch.positions.to(device),
        batch.slots.to(device),
        _paged(batch, single, counts, sizes, device) if bool(single.any()) else None,
        _chunks(batch, ~single, counts, page_tokens, device) if not bool(single.all()) else None,
    )


def widened(tables: torch.Tensor) -> torch.Tensor:
    """Tables [n, P] as int32, with columns added up to a whole number of TABLE_COLUMNS."""
    missing = -tables.shape[1] % TABLE_COLUMNS
    return torch.nn.functional.pad(tables.int(), (0, missing))


def _paged(
    batch: TokenBatch,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    sizes: Sizes,
    device: torch.device,
) -> PagedRows:
    rows = None
    if not bool(chosen.all()):
        rows = torch.tensor(batch.query_starts[:-1])[chosen].to(device)
    contexts = torch.tensor(batch.context_tokens, dtype=torch.int32)[chosen]
    splits = sizes.splits(len(contexts), int(contexts.max()))
    tables = widened(batch.page_tables[chosen])
    return PagedRows(rows, tables.to(device), contexts.to(device), splits)


def _chunks(
    batch: TokenBatch,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    page_tokens: int,
    device: torch.device,
) -> Chunks:
    rows = None
    if not bool(chosen.all()):
        rows = chosen.repeat_interleave(counts).nonzero().squeeze(1).to(device)
    contexts = torch.tensor(batch.context_tokens)[chosen]
    slots = [
        _slots(table, int(context), page_tokens)
        for table, context in zip(batch.page_tables[chosen], contexts, strict=True)
    ]
    return Chunks(
        rows,
        _starts(counts[chosen]).to(device),
        _starts(contexts).to(device),
        torch.cat(slots).to(device),
    )


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def _slots(table: torch.Tensor, context: int, page_tokens: int) -> torch.Tensor:
    """Slots [context] of a sequence's first tokens."""
    pages = table[: -(-context // page_tokens)]
    every = pages[:, None] * page_tokens + torch.arange(page_tokens)
    return every.flatten()[:context]
