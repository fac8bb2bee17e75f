"""Where keys and values are kept: pages of float, int8 or int4 numbers, written by slot.

A cache of keys (and one like it of values) is [pages, page_tokens, KH, D]; a slot is
page * page_tokens + offset. Its dtype says how numbers are kept:

- float32, float16, bfloat16: as they are; no scales.
- int8: symmetric per token and head, scales float32 [pages, page_tokens, KH] = absmax / 127.
- uint8: symmetric in groups of 32 along D, scales float16 [pages, page_tokens, KH, D / 32]. Values
  have 4 bits, [.., D / 2], nibbles as in `linear_w4`; keys have 5, [.., D / 2 + D / 8]: behind the
  nibbles their fifth bits, value 8 j + k in bit k of byte j. Keys cost most of what such a cache
  loses, and softmax most of what keys lose. Either side may have 4 or 5 bits: sizes tell.

Heads of a uint8 cache should be turned by Hadamard's matrix (QuaRot, Ashkboos et al., 2024), since
a few large channels would leave the others few levels: the caller turns queries, keys and values,
and turns outputs back.

`models` writes with `kv_write`; attention_paged.py reads.
"""

import torch

from kernels.reference.linear_int8 import quantize_rowwise_int8
from kernels.reference.linear_w4 import RUN, pack_nibbles, unpack_nibbles

PACKED_BITS = (4, 5)


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Stores keys and values [T, KH, D] at slots [T] int64 of both caches, in place.

    Rows whose slot is negative are padding and are written nowhere; the other slots differ. A key
    is stored the same way whatever else is written. Values of an int4 cache lie in float16's range.
    """
    kept = slots >= 0
    rows = slots[kept]
    for new, cache, scales in (
        (keys, key_cache, key_scales),
        (values, value_cache, value_scales),
    ):
        numbers, scale = _store(new[kept], cache, scales)
        cache.view(-1, *cache.shape[2:])[rows] = numbers
        if scale is not None:
            assert scales is not None
            scales.view(-1, *scales.shape[2:])[rows] = scale


def packed_bits(cache_width: int, groups: int) -> int | None:
    """How many bits a number of a uint8 cache has, by the bytes and the scales of a head; None
    where that is neither 4 nor 5."""
    return next((bits for bits in PACKED_BITS if cache_width * 8 == groups * RUN * bits), None)


def quantize_packed(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D], D a multiple of 32 -> (uint8 [..., D * bits / 8], float16 [..., D / 32]).

    scale = the number of a group that is furthest from zero (of two the negative one) over
    -2 ** (bits - 1), rounded to half: so that number has the level without an opposite.
    q = x / scale in float32, rounded half to even, within the levels, stored above zero; levels of
    zero where the scale is zero.
    """
    groups, zero = torch.unflatten(x.float(), -1, (-1, RUN)), 1 << (bits - 1)
    most, least = groups.amax(-1), groups.amin(-1)
    scale = (torch.where(most > -least, most, least) / -zero).half()
    divisors = torch.where(scale == 0, torch.inf, scale.float())[..., None]
    q = (groups / divisors).round().clamp(-zero, zero - 1).to(torch.int16) + zero
    levels = q.to(torch.uint8).flatten(-2)
    packed = pack_nibbles(levels & 15)
    if bits == 5:
        places = torch.arange(8, device=x.device)
        fifths = (torch.unflatten(levels >> 4, -1, (-1, 8)).int() << places).sum(-1)
        packed = torch.cat((packed, fifths.to(torch.uint8)), dim=-1)
    return packed, scale


def _levels(cache: torch.Tensor, bits: int) -> torch.Tensor:
    """What a uint8 cache [..., D * bits / 8] holds: int16 [..., D], zero in the middle."""
    width = cache.shape[-1] * 8 // bits
    levels = unpack_nibbles(cache[..., : width // 2]).to(torch.int16)
    if bits == 5:
        places = torch.arange(8, device=cache.device)
        fifths = (cache[..., width // 2 :, None].to(torch.int16) >> places) & 1
        levels = levels + (fifths.flatten(-2) << 4).to(torch.int16)
    return levels - (1 << (bits - 1))


def _store(
    x: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, KH, D] -> the numbers that such a cache holds, and their scales."""
    dtype = cache.dtype
    if dtype.is_floating_point:
        return x.to(dtype), None
    if dtype == torch.int8:
        q, scales = quantize_rowwise_int8(x.reshape(-1, x.shape[-1]))
        return q.view(x.shape), scales.view(x.shape[:2])
    if dtype == torch.uint8 and scales is not None:
        bits = packed_bits(cache.shape[-1], scales.shape[-1])
        assert bits is not None
        return quantize_packed(x, bits)
    raise ValueError(
        f"a cache of {dtype} is not known; accepted are float32, float16, bfloat16, int8 and "
        "uint8 (of 4 or 5 bits a number, with scales)."
    )


def read_cache(
    cache: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A cache of keys or of values, or any part of it [..., KH, D] with the scales of that part,
    as numbers of dtype [..., KH, D]."""
    if cache.dtype.is_floating_point:
        return cache.to(dtype)
    assert scales is not None
    if cache.dtype == torch.int8:
        return cache.to(dtype) * scales.to(dtype)[..., None]
    bits = packed_bits(cache.shape[-1], scales.shape[-1])
    assert bits is not None
    groups = torch.unflatten(_levels(cache, bits).to(dtype), -1, (-1, RUN))
    return (groups * scales.to(dtype)[..., None]).flatten(-2)
