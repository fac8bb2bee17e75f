"""One bit for each value, and one scale for each stretch of them, in bytes.

The scale is the mean of the magnitudes: of all multiples of the signs that one is nearest, so what
is left out is always less than what there was (Karimireddy et al. 2019, error feedback).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCALE_BYTES = 4


@dataclass(frozen=True)
class SignLayout:
    """How a vector of `elements` values is cut for `size` ranks: rank r decides about stretch r,
    and each stretch has scales of its own for every tensor in it.

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
    ends = sorted({stop for _, stop in spans} | {width * rank for rank in range(1, size + 1)})
    lengths: list[list[int]] = [[] for _ in range(size)]
    start = 0
    for end in ends:
        if end > start:
            lengths[start // width].append(end - start)
            start = end
    return SignLayout(
        elements, width, tuple(map(tuple, lengths)), max(len(found) for found in lengths)
    )


def encode(values: Tensor, lengths: Sequence[int], scales: int) -> Tensor:
    """values: a stretch; its payload, a vector of uint8."""
    magnitudes = [float(piece.abs().mean()) for piece in torch.split(values, list(lengths))]
    table = np.zeros(scales, dtype="<f4")
    table[: len(magnitudes)] = magnitudes
    bits = np.packbits((values >= 0).numpy())
    return torch.from_numpy(np.concatenate([table.view(np.uint8), bits]))


def decode(payload: Tensor, lengths: Sequence[int], scales: int, dtype: torch.dtype) -> Tensor:
    """The values that a payload stands for."""
    raw = payload.numpy()
    table = torch.from_numpy(raw[: scales * SCALE_BYTES].view("<f4").astype(np.float64))
    each = torch.repeat_interleave(table[: len(lengths)].to(dtype), torch.tensor(lengths))
    positive = torch.from_numpy(np.unpackbits(raw[scales * SCALE_BYTES :])).bool()
    return torch.where(positive[: each.numel()], each, -each)
