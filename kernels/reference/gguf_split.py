"""GGUF's blocks, taken apart into the layouts of `linear_w4` and `linear_w8` without loss.

`from_gguf` runs once, when weights are loaded. `dequantize_blocks` decodes blocks as they are
stored; it is what a device without a kernel for quantised products does before an ordinary one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.formats import FORMATS
from kernels.reference.dequantize import dequantize
from kernels.reference.linear_w4 import pack_nibbles


class SplitWeight(NamedTuple):
    """A matrix [N, K]: qweight uint8 [N, K / 2] (4 bit) or int8 [N, K] (8 bit), scales [N, K / G],
    and mins of the same shape, or None where the format is symmetric."""

    qweight: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None


def from_gguf(stored: torch.Tensor, form: str, rows: int, columns: int) -> SplitWeight:
    """stored (1-D uint8): a matrix of `rows` times `columns` as GGUF stores it in format `form`.

    Q4_0, Q4_1, Q4_K give 4 bits, Q5_0, Q8_0, Q6_K 8 bits; the dequantised weight has the bits of
    `dequantize`. Scales are float16 as stored, or float32 products of two scales (Q4_K, Q6_K). G
    is 32, for Q6_K 16. ValueError for another format, or a size that is not that of the blocks.
    """
    if form not in _SPLITTERS:
        known = ", ".join(_SPLITTERS)
        raise ValueError(f"block format {form!r} is not split into planes; accepted are {known}.")
    block = FORMATS[form]
    if columns % block.block_values:
        raise ValueError(
            f"a row of {form} is a multiple of {block.block_values} columns, not {columns}."
        )
    wanted = rows * columns // block.block_values * block.block_bytes
    if stored.dtype != torch.uint8 or stored.shape != (wanted,):
        raise ValueError(
            f"{rows} x {columns} values of {form} are {wanted} bytes in one dimension, not "
            f"{list(stored.shape)} of {stored.dtype}."
        )
    qweight, scales, mins = _SPLITTERS[form](stored.reshape(-1, block.block_bytes))
    shaped = scales.reshape(rows, -1)
    return SplitWeight(
        qweight.reshape(rows, columns // 2 if qweight.dtype == torch.uint8 else columns),
        shaped,
        None if mins is None else mins.reshape(shaped.shape),
    )


def dequantize_blocks(stored: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """stored (1-D uint8, whole blocks of format `form`) -> its values, 1-D of dtype."""
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"block format {form!r} is not known; accepted are {known}.")
    block = FORMATS[form]
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.shape[0] % block.block_bytes:
        raise ValueError(
            f"blocks of {form} are a multiple of {block.block_bytes} bytes (uint8) in one "
            f"dimension, not {list(stored.shape)} of {stored.dtype}."
        )
    count = stored.shape[0] // block.block_bytes * block.block_values
    out = torch.empty(count, dtype=dtype, device=stored.device)
    return dequantize(stored.contiguous(), form, out)


def _halves(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes start..stop as float16 [blocks, n]."""
    return blocks[:, start:stop].contiguous().view(torch.float16)


_Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _q4_0(blocks: torch.Tensor) -> _Planes:
    return blocks[:, 2:].contiguous(), _halves(blocks, 0, 2), None


def _q4_1(blocks: torch.Tensor) -> _Planes:
    return blocks[:, 4:].contiguous(), _halves(blocks, 0, 2), _halves(blocks, 2, 4)


def _q5_0(blocks: torch.Tensor) -> _Planes:
    """Fifth bits are in four bytes before the nibbles, the lowest first."""
    fifths = ((blocks[:, 2:6, None] >> torch.arange(8)) & 1).flatten(1)
    nibbles = torch.cat((blocks[:, 6:] & 15, blocks[:, 6:] >> 4), dim=1)
    return (nibbles | (fifths << 4)).to(torch.int8) - 16, _halves(blocks, 0, 2), None


def _q8_0(blocks: torch.Tensor) -> _Planes:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0, 2), None


def _q4_k(blocks: torch.Tensor) -> _Planes:
    """A block's nibbles stand in runs of 64: 32 low ones, then 32 high ones."""
    scale, low_scale = _halves(blocks, 0, 4).float().chunk(2, dim=1)
    first, second, high = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (high & 15) | ((first >> 2) & 48)), dim=1).float()
    lows = torch.cat((second & 63, (high >> 4) | ((second >> 2) & 48)), dim=1).float()
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = torch.cat((packed & 15, packed >> 4), dim=2).reshape(-1, 256)
    return pack_nibbles(values), scale * scales, -(low_scale * lows)


def _q6_k(blocks: torch.Tensor) -> _Planes:
    """Four low bits and two high bits are stored apart; sixteen int8 scales share a float16."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    bottom = torch.cat((low & 15, low >> 4), dim=2).reshape(-1, 256)
    top = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(-1, 256)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    values = (bottom | (top << 4)).to(torch.int8) - 32
    return values, _halves(blocks, 208, 210).float() * scales, None


_SPLITTERS: dict[str, Callable[[torch.Tensor], _Planes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}

SPLIT = tuple(_SPLITTERS)
"""The formats that `from_gguf` takes."""
