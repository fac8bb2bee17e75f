"""The decoder in whole numbers: embedding, layers, final norm and head up to integer logits.

No float is made or read here: weights are int8, activations int32 at points that
`models/integer_build.py` chose when it made the decoder, keys and values 15 bits. Integer sums know
no order, so a token's logits are the same however its text was cut into calls. Run by
`serve/perplexity.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.reference import integer
from models.config import ModelConfig


@dataclass(frozen=True)
class Matrix:
    """weight int8 [N, K] and what `kernels.reference.integer.linear` does with its products."""

    weight: torch.Tensor
    multiplier: torch.Tensor
    shift: int
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x int32 [..., K] -> int32 [..., N]."""
        return integer.linear(x, self.weight, self.multiplier, self.shift, self.bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix as an embedding, int32 [*ids.shape, K]."""
        return integer.requantise(self.weight[ids], self.multiplier[ids].unsqueeze(-1), self.shift)


@dataclass(frozen=True)
class Norm:
    """See `kernels.reference.integer.rms_norm`."""

    weight: torch.Tensor
    epsilon: int
    shift: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x int32 [..., n] -> the same shape."""
        return integer.rms_norm(x, self.weight, self.epsilon, self.shift)


class Past(NamedTuple):
    """Keys (rotated) and values of one layer, int16 [sequences, tokens, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the positions of one call, int32 [tokens, 1, head_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Shifts:
    """From the points of one layer's values to those of the next operation.

    query, key, value: to 15 bits; score_multiplier, score: to exponents; gate_point: of gate and
    up; gated: from their product.
    """

    query: int
    key: int
    value: int
    score_multiplier: int
    score: int
    gate_point: int
    gated: int


@dataclass(frozen=True)
class Layer:
    """One pre-norm residual layer: attention, then the gated feed-forward."""

    heads: int
    kv_heads: int
    mixer_norm: Norm
    qkv: Matrix
    out: Matrix
    feedforward_norm: Norm
    gate_up: Matrix
    down: Matrix
    shifts: Shifts

    def __call__(
        self, x: torch.Tensor, rotation: Rotation, past: Past | None = None
    ) -> tuple[torch.Tensor, Past]:
        """x int32 [sequences, tokens, hidden] -> the same shape, and the past with these tokens."""
        mixed, past = self._mix(self.mixer_norm(x), rotation, past)
        x = integer.narrow(x.long() + mixed)
        gate_up = self.gate_up(self.feedforward_norm(x))
        fed = integer.gated(gate_up, "silu", self.shifts.gate_point, self.shifts.gated)
        return integer.narrow(x.long() + self.down(fed)), past

    def _mix(
        self, x: torch.Tensor, rotation: Rotation, past: Past | None
    ) -> tuple[torch.Tensor, Past]:
        shifts = self.shifts
        heads = self.qkv(x).view(*x.shape[:-1], self.heads + 2 * self.kv_heads, -1)
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], -2)
        queries = integer.rotate(q, *rotation, shifts.query)
        keys = integer.rotate(k, *rotation, shifts.key).short()
        values = integer.narrow(integer.round_shift(v, shifts.value), integer.PAIR_BITS).short()
        if past is not None:
            keys, values = torch.cat((past.keys, keys), 1), torch.cat((past.values, values), 1)
        scale = shifts.score_multiplier, shifts.score
        mixed = [
            integer.attention(*each, *scale) for each in zip(queries, keys, values, strict=True)
        ]
        return self.out(torch.stack(mixed).flatten(-2)), Past(keys, values)


@dataclass(frozen=True)
class IntegerDecoder:
    """A decoder of `config`'s shape. Logits are integers: real ones times 2^logit_point.

    embed's rows are scaled to the residual stream, head is the matrix behind the last norm; tables:
    of every position of the model's context.
    """

    config: ModelConfig
    embed: Matrix
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix
    tables: Rotation
    logit_point: int

    def __call__(
        self, ids: torch.Tensor, pasts: Sequence[Past] | None = None
    ) -> tuple[torch.Tensor, list[Past]]:
        """ids int64 [sequences, tokens] after pasts -> logits int32 [sequences, tokens, vocab], and
        the pasts of the next call, one a layer. ValueError for more tokens than the context."""
        start = 0 if pasts is None else pasts[0].keys.shape[1]
        stop = start + ids.shape[1]
        if stop > self.config.context_tokens:
            raise ValueError(
                f"{stop} tokens do not fit this model's context; up to "
                f"{self.config.context_tokens} are accepted."
            )
        rotation = Rotation(*(table[start:stop] for table in self.tables))
        x, made = self.embed.rows(ids), []
        for index, layer in enumerate(self.layers):
            x, past = layer(x, rotation, None if pasts is None else pasts[index])
            made.append(past)
        return self.head(self.norm(x)), made
