"""Drives a decoder without an engine: a cache with scattered pages, and steps over sequences."""

from collections.abc import Sequence

import torch

from kernels.kv_formats import FORMATS
from models.batch import TokenBatch
from models.decoder import Decoder
from models.packed import PackedDecoder


class Sequences:
    """Sequences of one decoder, told apart by number; each owns a random set of pages."""

    def __init__(
        self,
        decoder: Decoder | PackedDecoder,
        count: int,
        tokens: int,
        page_tokens: int = 16,
        seed: int = 0,
        kv_format: str = "float32",
    ) -> None:
        config, self.decoder, self.page_tokens = decoder.config, decoder, page_tokens
        each = -(-tokens // page_tokens)
        order = torch.randperm(count * each, generator=torch.Generator().manual_seed(seed))
        self.tables = order.view(count, each)
        # Poison: whatever is read without having been written spoils the result visibly. Not NaN,
        # since masked columns are multiplied by an exact zero.
        stored = FORMATS[kv_format]
        elements = stored.elements(config.head_dim)
        shape = (config.layers, 2, count * each, page_tokens, config.kv_heads, elements)
        dtype = decoder.dtype if kv_format == "float32" else getattr(torch, stored.stored)
        self.kv = torch.full(shape, 100 if dtype == torch.uint8 else 1e4, dtype=dtype)
        self.lengths = [0] * count

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Logits [all rows, vocab] after giving each (sequence, ids) its next tokens."""
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for number, more in work:
            before = self.lengths[number]
            place = torch.arange(before, before + len(more))
            table = self.tables[number]
            ids.append(torch.tensor(more))
            positions.append(place)
            slots.append(
                table[place // self.page_tokens] * self.page_tokens + place % self.page_tokens
            )
            self.lengths[number] = before + len(more)
            starts.append(starts[-1] + len(more))
            contexts.append(self.lengths[number])
        batch = TokenBatch(
            torch.cat(ids),
            torch.cat(positions),
            torch.cat(slots),
            tuple(starts),
            tuple(contexts),
            self.tables[[number for number, _ in work]],
            torch.arange(starts[-1]),
        )
        with torch.inference_mode():
            logits: torch.Tensor = self.decoder(batch, self.kv)
            return logits
