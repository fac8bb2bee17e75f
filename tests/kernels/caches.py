"""One layer's KV cache as the CPU kernels' attention uses it, and what it must hold and yield.

`encoded` and `decoded` are the formats of kernels/kv_formats.py once more, in torch.
"""

import torch

from kernels.cpu import ops
from kernels.kv_formats import FORMATS

HEADS, KV_HEADS, DIM = 6, 2, 64


class Cache:
    """Sequences in one layer's cache, told apart by number; each owns a random set of pages.

    What nobody wrote is NaN: as a number, as a scale and as a minimum.
    """

    def __init__(
        self,
        count: int,
        tokens: int,
        page_tokens: int = 16,
        seed: int = 0,
        kv_format: str = "float32",
    ) -> None:
        self.page_tokens, self.count, self.kv_format = page_tokens, count, kv_format
        each = -(-tokens // page_tokens)
        order = torch.randperm(count * each, generator=torch.Generator().manual_seed(seed))
        self.tables = order.view(count, each)
        stored = FORMATS[kv_format]
        shape = (2, count * each, page_tokens, KV_HEADS, stored.elements(DIM))
        dtype = getattr(torch, stored.stored)
        self.kv = torch.full(shape, 255 if dtype == torch.uint8 else float("nan"), dtype=dtype)
        self.lengths = [0] * count

    def slots(self, number: int, start: int, stop: int) -> torch.Tensor:
        """Of a sequence's positions start..stop - 1."""
        place = torch.arange(start, stop)
        pages = self.tables[number, place // self.page_tokens]
        return pages * self.page_tokens + place % self.page_tokens

    def read(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, KV_HEADS, DIM] of a sequence, as they are stored; int4 stores
        them turned."""
        flat = self.kv.flatten(1, 2)[:, self.slots(number, 0, self.lengths[number])]
        both = decoded(flat, self.kv_format).double()
        keys, values = spread(both) if self.kv_format == "int4" else both
        return keys, values

    def step(self, work: list[tuple[int, torch.Tensor]], heads: int = HEADS, **how) -> torch.Tensor:
        """[all rows, heads * DIM] after giving each (sequence, qkv rows) its next tokens."""
        positions, slots, sequences = [], [], []
        for number, rows in work:
            start, stop = self.lengths[number], self.lengths[number] + len(rows)
            self.lengths[number] = stop
            positions.append(torch.arange(start, stop))
            slots.append(self.slots(number, start, stop))
            sequences.append(torch.full((len(rows),), number))
        place = torch.cat(positions)
        angles = angles_of(place)
        step = ops.LayerStep(
            place, torch.cat(slots), torch.cat(sequences), self.tables, angles.cos(), angles.sin()
        )
        qkv = torch.cat([rows for _, rows in work])
        return ops.attention(qkv, self.kv, heads, step, **how)


def angles_of(positions: torch.Tensor) -> torch.Tensor:
    """[N, DIM / 2]."""
    return positions[:, None] * torch.arange(1, DIM // 2 + 1) * 0.01


def drawn(tokens: int, heads: int = HEADS, seed: int = 0) -> torch.Tensor:
    """Queries, keys and values of so many tokens."""
    chance = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, (heads + 2 * KV_HEADS) * DIM, generator=chance)


def rotated(qkv: torch.Tensor, heads: int = HEADS) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [tokens, .., DIM] of a sequence from its start, rotated, in the
    type of qkv."""
    tokens, half = len(qkv), DIM // 2
    split = qkv.view(tokens, heads + 2 * KV_HEADS, DIM)
    angles = angles_of(torch.arange(tokens))[:, None]
    cosines, sines = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
    a, b = split[..., :half], split[..., half:]
    turned = torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)
    return turned[:, :heads], turned[:, heads : heads + KV_HEADS], split[:, -KV_HEADS:]


def attended(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence from its start, in float64: [tokens, heads * DIM]."""
    tokens, group = len(queries), queries.shape[1] // KV_HEADS
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) / DIM**0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def encoded(both: torch.Tensor, kv_format: str) -> torch.Tensor:
    """Keys and values [2, .., DIM] float32 as a cache stores them: [2, .., elements]."""
    if kv_format == "float32":
        return both
    if kv_format == "float16":
        return both.clamp(-65504, 65504).half()
    if kv_format == "int8":
        scale = both.abs().amax(-1, keepdim=True) / 127
        levels = torch.where(scale > 0, both / scale, 0.0).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([levels.view(torch.uint8), scale.contiguous().view(torch.uint8)], -1)
    groups = both.unflatten(-1, (-1, 32))
    keys, key_scales = fitted(groups[0], 16)
    values, value_scales = fitted(groups[1], 8)
    nibbles = torch.stack([keys % 16, values])
    packed = (nibbles[..., :16] + 16 * nibbles[..., 16:]).to(torch.uint8).flatten(-2)
    places = 2 ** torch.arange(8.0)
    fifths = ((keys // 16).unflatten(-1, (4, 8)) * places).sum(-1).to(torch.uint8)
    scales = torch.cat([value_scales, key_scales], -1).half().contiguous().view(torch.uint8)
    return torch.cat([packed, torch.stack([fifths, scales]).flatten(-2)], -1)


def fitted(x: torch.Tensor, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0..2 zero - 1 of groups x [.., 32], and their scales, which are halves. From the
    number furthest from zero on, four times the scale of least squares, then the levels nearest."""

    def half(value: torch.Tensor) -> torch.Tensor:
        return value.clamp(-65504, 65504).half().float() + 0.0  # never minus zero

    def nearest(scale: torch.Tensor) -> torch.Tensor:
        return torch.where(scale == 0, 0.0, x / scale).round().clamp(-zero, zero - 1)

    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = half(torch.where(most > -least, most, least) / -zero)
    levels, going = nearest(scale), scale != 0
    for _ in range(4):
        better = half(halved(levels * x) / halved(levels * levels))
        going = going & (better.nan_to_num() != 0)
        scale = torch.where(going, better, scale)
        levels = torch.where(going, nearest(scale), levels)
    return levels + zero, scale


def halved(x: torch.Tensor) -> torch.Tensor:
    """The sum of x [.., 32], one half added to the other until one value is left: [.., 1]."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


def spread(x: torch.Tensor) -> torch.Tensor:
    """x [.., DIM] times Hadamard's matrix over sqrt(DIM), its own inverse: as int4 turns heads."""
    for stride in (1 << n for n in range(DIM.bit_length() - 1)):
        pairs = x.unflatten(-1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).flatten(-3)
    turned: torch.Tensor = x / DIM**0.5
    return turned


def decoded(stored: torch.Tensor, kv_format: str) -> torch.Tensor:
    """What `encoded` stands for: [2, .., DIM] float32."""
    if kv_format in ("float32", "float16"):
        return stored.float()
    if kv_format == "int8":
        scale = stored[..., DIM:].contiguous().view(torch.float32)
        return stored[..., :DIM].contiguous().view(torch.int8) * scale
    packed = stored[..., : DIM // 2].unflatten(-1, (-1, 16))
    levels = torch.cat([packed & 15, packed >> 4], -1).float()
    fifths, scales = stored[..., DIM // 2 :].contiguous()
    bits = fifths[..., None].int() // 2 ** torch.arange(8) % 2
    levels[0] += 16 * bits.view(levels[0].shape)
    facts = scales.contiguous().view(torch.float16).unflatten(-1, (-1, 2)).float()
    zero = torch.tensor([16.0, 8.0]).view(2, *[1] * (levels.dim() - 1))
    values: torch.Tensor = (levels - zero) * torch.stack([facts[..., 1:], facts[..., :1]])
    return values.flatten(-2)
