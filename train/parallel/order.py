"""Which positions of a sequence each rank holds, where several share one sequence.

Contiguous is the plain way, and unfair under a causal mask: the last rank's queries see all keys,
the first one's few. Zigzag (Zhu 2024, after Striped Attention, Brandon et al. 2023) cuts a sequence
into 2 x size chunks and gives rank r the chunks r and 2 x size - 1 - r, so that each has the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A rectangle of attention: of the query rank's tokens and the key rank's, with all of it seen,
    or its lower triangle."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Order:
    """`tokens` of one sequence on `size` ranks. ValueError unless they can be shared out evenly."""

    tokens: int
    size: int
    zigzag: bool = True

    def __post_init__(self) -> None:
        if self.tokens % self.chunks:
            kind = "2 x ranks (zigzag)" if self.zigzag else "ranks"
            raise ValueError(
                f"a sequence of {self.tokens} tokens is not divisible by {kind} = {self.chunks}; "
                f"{self.tokens // self.chunks * self.chunks} tokens would be accepted"
            )

    @property
    def chunks(self) -> int:
        """Stretches that a sequence is cut into."""
        return self.size * (2 if self.zigzag else 1)

    @property
    def local_tokens(self) -> int:
        """That each rank holds."""
        return self.tokens // self.size

    def positions(self, rank: int) -> Tensor:
        """Of this rank's tokens, as it holds them: (local_tokens,), ascending."""
        chunk = self.tokens // self.chunks
        held = (rank, self.chunks - 1 - rank) if self.zigzag else (rank,)
        return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in held])

    def piece(self, queries: int, keys: int) -> Piece | None:
        """What rank `queries` sees of what rank `keys` holds; None: nothing."""
        everything = slice(0, self.local_tokens)
        if queries == keys:
            return Piece(everything, everything, True)
        if not self.zigzag:
            return Piece(everything, everything, False) if keys < queries else None
        half = self.local_tokens // 2
        if keys < queries:  # its early chunk is before both of ours, its late one after both
            return Piece(everything, slice(0, half), False)
        return Piece(slice(half, self.local_tokens), everything, False)
