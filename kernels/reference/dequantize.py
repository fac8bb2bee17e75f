"""From stored blocks to float32 values, bit for bit as ggml and the `gguf` library do it.

Called by the loaders, a few thousand rows at a time. Works through the blocks in pieces that
stay in cache, straight into the destination, so that loading costs one pass and no second copy.
"""

from collections.abc import Callable

import torch

from kernels.formats import FORMATS

# Temporaries of a piece stay in cache, and torch runs an operation of this size on the calling
# thread: several loading processes on few cores would else wait for each other at every barrier.
PIECE_VALUES = 32768


def dequantize(stored: torch.Tensor, name: str, out: torch.Tensor) -> torch.Tensor:
    """Decodes stored (1-D uint8, whole blocks of format `name`) into out and returns it.

    out is contiguous, of any floating dtype, with exactly as many values as `stored` holds
    (asserted). Unknown names: ValueError.
    """
    if name not in _DECODERS:
        known = ", ".join(_DECODERS)
        raise ValueError(f"block format {name!r} is not known; accepted are {known}.")
    form = FORMATS[name]
    blocks = stored.view(-1, form.block_bytes)
    assert out.is_contiguous() and out.numel() == blocks.shape[0] * form.block_values
    flat = out.view(-1, form.block_values)
    step = PIECE_VALUES // form.block_values
    for start in range(0, blocks.shape[0], step):
        target = flat[start : start + step]
        _DECODERS[name](blocks[start : start + step], target)
    return out


def _reinterpret(blocks: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes start..stop of every block as float32 [blocks, n]; copies, since blocks are odd-sized
    and a view would be unaligned."""
    return blocks[:, start:stop].contiguous().view(dtype).float()


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def decode(blocks: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(blocks.contiguous().view(dtype))

    return decode


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[blocks, n] bytes -> [blocks, 2n] float32: all low halves, then all high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1).float()


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _reinterpret(blocks, 0, 2, torch.float16)
    out.copy_(_nibbles(blocks[:, 2:]).sub_(8).mul_(scale))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale, low = _reinterpret(blocks, 0, 4, torch.float16).chunk(2, dim=1)
    out.copy_(_nibbles(blocks[:, 4:]).mul_(scale).add_(low))


def _fifths(packed: torch.Tensor) -> torch.Tensor:
    """[blocks, 4] bytes -> [blocks, 32] float32: 16 for each bit that is set, the lowest first."""
    places = torch.arange(8)
    return (((packed[:, :, None] >> places) & 1) << 4).flatten(1).float()


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _reinterpret(blocks, 0, 2, torch.float16)
    levels = _nibbles(blocks[:, 6:]).add_(_fifths(blocks[:, 2:6]))
    out.copy_(levels.sub_(16).mul_(scale))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale, low = _reinterpret(blocks, 0, 4, torch.float16).chunk(2, dim=1)
    levels = _nibbles(blocks[:, 8:]).add_(_fifths(blocks[:, 4:8]))
    out.copy_(levels.mul_(scale).add_(low))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _reinterpret(blocks, 0, 2, torch.float16)
    out.copy_(_reinterpret(blocks, 2, 34, torch.int8).mul_(scale))


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Eight groups of 32 with 6-bit scales and minima, themselves scaled by two float16."""
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = torch.cat((packed & 15, packed >> 4), dim=2).float().view(-1, 8, 32)
    _nested(blocks, values, out)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """As Q4_K; 32 bytes hold the fifth bits, bit g of byte i that of value i of group g."""
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    values = torch.cat((packed & 15, packed >> 4), dim=2).view(-1, 8, 32)
    fifths = (blocks[:, None, 16:48] >> torch.arange(8)[:, None]) & 1
    _nested(blocks, (values | (fifths << 4)).float(), out)


def _nested(blocks: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """values [blocks, 8, 32] of 4 or 5 bits, with the scales at the blocks' beginning, into out."""
    scale, low_scale = _reinterpret(blocks, 0, 4, torch.float16).chunk(2, dim=1)
    first, second, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (high & 15) | ((first >> 2) & 48)), dim=1).float()
    lows = torch.cat((second & 63, (high >> 4) | ((second >> 2) & 48)), dim=1).float()
    values.mul_((scale * scales)[:, :, None]).sub_((low_scale * lows)[:, :, None])
    out.copy_(values.view(-1, 256))


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Sixteen groups of 16 with int8 scales; 4 low bits and 2 high bits are stored apart."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    bottom = torch.cat((low & 15, low >> 4), dim=2).view(-1, 8, 32)
    top = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).view(-1, 8, 32)
    scales = _reinterpret(blocks, 192, 208, torch.int8)
    scale = _reinterpret(blocks, 208, 210, torch.float16)
    values = (bottom | (top << 4)).float().sub_(32).view(-1, 16, 16)
    out.copy_(values.mul_((scale * scales)[:, :, None]).view(-1, 256))


_DECODERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
