"""One bit for each value, and one scale for each stretch of them, in bytes.

The scale is the mean of the magnitudes: of all multiples of the signs that one is nearest, so what
is left out is always less than what there was (Karimireddy et al. 2019, error feedback).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCALE_BYTES = 4
BLOCK = 1024
"""Values of a tensor that have the same scale. A scale for a whole tensor costs no loss in bytes to
speak of, but loss in training: rows of an embedding, and heads, differ in size among themselves."""


@dataclass(frozen=True)
class SignLayout:
    """How a vector of `elements` values is cut for `size` ranks: rank r decides about stretch r,
    and each stretch has scales of its own for every block of a tensor in it.

    width: values of a stretch, a multiple of 8, the last one padded; lengths: by stretch, how many
    values have the same scale; scales: how many a payload has room for.
    """

    elements: int
    width: int
    lengths: tuple[tuple[int, ...], ...]
    scales: int

    @property
    def payload_bytes(self) -> int:
        """Of one stretch."""
        return self.scales * SCALE_BYTES + self.width // 8


def sign_layout(spans: Sequence[tuple[int, int]], size: int) -> SignLayout:
    """spans: of the tensors, end to end."""
    elements = spans[-1][1]
    width = -(-elements // (8 * size)) * 8
    blocks = {stop for span in spans for stop in _blocks(*span)}
    ends = sorted(blocks | {width * rank for rank in range(1, size + 1)})
    lengths: list[list[int]] = [[] for _ in range(size)]
    start = 0
    for end in ends:
        if end > start:
            lengths[start // width].append(end - start)
            start = end
    return SignLayout(
        elements, width, tuple(map(tuple, lengths)), max(len(found) for found in lengths)
    )


def _blocks(start: int, stop: int) -> Iterator[int]:
    """The ends of a tensor's blocks: a last one that would be less than half a block is a part of
    the one before."""
    count = max(1, (stop - start + BLOCK // 2) // BLOCK)
    yield from (start + BLOCK * number for number in range(1, count))
    yield stop


def encode(values: Tensor, lengths: Sequence[int], scales: int) -> Tensor:
    """values: a stretch; its payload, a vector of uint8."""
    starts = np.cumsum([0, *lengths[:-1]])
    sums = np.add.reduceat(values.abs().numpy(), starts, dtype=np.float64)
    table = np.zeros(scales, dtype="<f4")
    table[: len(lengths)] = sums / np.array(lengths)
    bits = np.packbits((values >= 0).numpy())
    return torch.from_numpy(np.concatenate([table.view(np.uint8), bits]))


def decode(payload: Tensor, lengths: Sequence[int], scales: int, dtype: torch.dtype) -> Tensor:
    """The values that a payload stands for."""
    raw = payload.numpy()
    table = torch.from_numpy(raw[: scales * SCALE_BYTES].view("<f4").astype(np.float64))
    each = torch.repeat_interleave(table[: len(lengths)].to(dtype), torch.tensor(lengths))
    positive = torch.from_numpy(np.unpackbits(raw[scales * SCALE_BYTES :])).bool()
    return torch.where(positive[: each.numel()], each, -each)
