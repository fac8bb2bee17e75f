"""From slices to logits: builds the flat token batch and calls the model. The only caller of it.

`Runner` is what Engine needs; `ModelRunner` is the real one. A test may pass a runner with known
logits instead of a model.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import TokenBatch
from models.decoder import Decoder
from models.packed import PackedDecoder
from serve.engine.scheduler import Slice
from serve.kv.storage import KVStorage


class Rows(NamedTuple):
    """Of the last `rows` tokens of each slice, R in all: logits [R, vocab] float32, final states
    [R, hidden]."""

    logits: Tensor
    states: Tensor


class Runner(Protocol):
    """Computes a step's slices."""

    def run(self, slices: list[Slice]) -> Rows:
        """The rows that the slices want, in order; K/V of every slice's tokens written to
        its pages."""
        ...


class ModelRunner:
    """Runs a decoder over paged KV storage."""

    def __init__(self, decoder: Decoder | PackedDecoder, storage: KVStorage) -> None:
        self.decoder = decoder
        self.storage = storage

    def run(self, slices: list[Slice]) -> Rows:
        with torch.inference_mode():
            states = self.decoder.states(token_batch(slices), self.storage.tensor)
            return Rows(self.decoder.logits(states), states)

    def warm_up(self) -> None:
        """Read all weights once, writing to a page that nobody has yet: mapped weights come from
        disk at their first use, which would otherwise be somebody's first token."""
        one = torch.zeros(1, dtype=torch.int64)
        batch = TokenBatch(one, one, one, (0, 1), (1,), one[None], one)
        with torch.inference_mode():
            self.decoder(batch, self.storage.tensor)


def token_batch(slices: list[Slice]) -> TokenBatch:
    """The flat batch of a step's slices (see models.batch.TokenBatch for shapes)."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[NDArray[np.int64]] = []
    starts = [0]
    for piece in slices:
        table = piece.sequence.table
        assert table is not None
        ids += piece.sequence.tokens(piece.start, piece.stop)
        positions += range(piece.start, piece.stop)
        slots.append(table.slots(piece.start, piece.stop))
        starts.append(len(ids))
    ends = zip(slices, starts[1:], strict=True)
    rows = [row for piece, stop in ends for row in range(stop - piece.rows, stop)]
    return TokenBatch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slots=torch.from_numpy(np.concatenate(slots)),
        query_starts=tuple(starts),
        context_tokens=tuple(piece.stop for piece in slices),
        page_tables=_page_tables(slices),
        logit_rows=torch.tensor(rows, dtype=torch.int64),
    )


def _page_tables(slices: list[Slice]) -> Tensor:
    """[S, widest] int64: the pages that each slice attends to, padded with 0."""
    rows = []
    for piece in slices:
        table = piece.sequence.table
        assert table is not None
        rows.append(table.pages[: -(-piece.stop // table.pool.page_tokens)])
    widest = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (widest - len(row)) for row in rows])
