"""Numbers of 1 to 8 bits side by side in bytes: eight of them take exactly `bits` bytes."""

import torch
from torch import Tensor

EIGHT = 8


def pack(values: Tensor, bits: int) -> Tensor:
    """values: (n,) uint8 below 2**bits. (ceil(n / 8) * bits,) uint8, or n bytes for 8 bits.
    ValueError for other widths."""
    _check(bits)
    if bits == EIGHT:
        return values
    padded = torch.nn.functional.pad(values, (0, -values.numel() % EIGHT))
    words = torch.zeros(padded.numel() // EIGHT, dtype=torch.int64)
    for place in range(EIGHT):
        words |= padded[place::EIGHT].long() << (place * bits)
    words_bytes = words.view(torch.uint8).view(-1, EIGHT)  # little-endian
    packed = torch.empty(len(words), bits, dtype=torch.uint8)  # a slice would keep all of the words
    return packed.copy_(words_bytes[:, :bits]).view(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The (count,) uint8 that `pack` was given."""
    _check(bits)
    if bits == EIGHT:
        return packed
    wide = torch.zeros(packed.numel() // bits, EIGHT, dtype=torch.uint8)
    wide[:, :bits] = packed.view(-1, bits)
    words = wide.view(torch.int64).view(-1)
    values = torch.empty(words.numel() * EIGHT, dtype=torch.uint8)
    for place in range(EIGHT):
        values[place::EIGHT] = (words >> (place * bits)) & ((1 << bits) - 1)
    return values[:count]


def _check(bits: int) -> None:
    if not 1 <= bits <= EIGHT:
        raise ValueError(f"bits = {bits}: 1 to 8 bits are packed")
