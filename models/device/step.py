"""What one step computes, on the device: rows that each read pages, and chunks of prompts.

A row reads all of its context from pages, however many rows its sequence has in the step; that is
what a decode step is made of. A chunk's rows share what they read: the context is gathered once and
attended to in blocks. Both are computed over all rows, with zeros for rows of the other sort, and
added: so a step's shape does not depend on who is of which.
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
    """tables [N, P] int32 and contexts [N] int32: pages of each row, and how many tokens it sees, 0
    for a row that is no such one. splits: parts of a context."""

    tables: torch.Tensor
    contexts: torch.Tensor
    splits: int


class Chunks(NamedTuple):
    """starts and key_starts [S + 1] int32 as prefill_attention takes them, key_slots [C] int64:
    where the keys of all sequences are in the cache."""

    starts: torch.Tensor
    key_starts: torch.Tensor
    key_slots: torch.Tensor


class Step(NamedTuple):
    """ids, positions, slots [N] int64 as in TokenBatch, a negative slot for a row that nobody
    reads. paged or chunks is None where no row is of that sort."""

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


def single_rows(batch: TokenBatch) -> int:
    """How many sequences stand before the first with more than one row; its own and all later ones
    are chunks, if only of one row. The engine has those that decode before all others."""
    starts = batch.query_starts
    pairs = enumerate(zip(starts, starts[1:], strict=False))
    return next((n for n, (start, stop) in pairs if stop - start > 1), len(starts) - 1)


def step_of(batch: TokenBatch, page_tokens: int, sizes: Sizes, device: torch.device) -> Step:
    """The batch on the device."""
    rows, singles = len(batch.ids), single_rows(batch)
    paged = chunks = None
    if singles:
        tables, contexts = paged_rows(batch, singles, rows)
        splits = sizes.splits(rows, max(batch.context_tokens[:singles]))
        paged = PagedRows(widened(tables).to(device), contexts.to(device), splits)
    if singles < len(batch.context_tokens):
        chunks = Chunks(*(each.to(device) for each in chunk_places(batch, singles, page_tokens)))
    return Step(
        batch.ids.to(device), batch.positions.to(device), batch.slots.to(device), paged, chunks
    )


def widened(tables: torch.Tensor) -> torch.Tensor:
    """Tables [n, P] with columns added up to a whole number of TABLE_COLUMNS."""
    return torch.nn.functional.pad(tables, (0, -tables.shape[1] % TABLE_COLUMNS))


def paged_rows(batch: TokenBatch, singles: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tables [rows, P] int32, contexts [rows] int32) of the first sequences, zeros behind them."""
    tables = torch.zeros(rows, batch.page_tables.shape[1], dtype=torch.int32)
    tables[:singles] = batch.page_tables[:singles]
    contexts = torch.zeros(rows, dtype=torch.int32)
    contexts[:singles] = torch.tensor(batch.context_tokens[:singles])
    return tables, contexts


def chunk_places(batch: TokenBatch, singles: int, page_tokens: int) -> Chunks:
    """In host memory, of the sequences from `singles` on."""
    starts = torch.tensor(batch.query_starts[singles:], dtype=torch.int32)
    contexts = batch.context_tokens[singles:]
    key_starts = torch.nn.functional.pad(torch.tensor(contexts).cumsum(0), (1, 0)).int()
    within = torch.arange(page_tokens)
    slots = [
        (table[: -(-context // page_tokens), None] * page_tokens + within).flatten()[:context]
        for table, context in zip(batch.page_tables[singles:], contexts, strict=True)
    ]
    return Chunks(starts, key_starts, torch.cat(slots))
