"""Where keys and values are kept: pages of float, int8 or int4 numbers, written by slot.

A cache of keys (and one like it of values) is [pages, page_tokens, KH, D]; a slot is
page * page_tokens + offset. Its dtype says how numbers are kept:

- float32, float16, bfloat16: as they are; no scales.
- int8: symmetric per token and head, scales float32 [pages, page_tokens, KH] = absmax / 127.
- uint8 [.., D / 2]: 4 bits in groups of 32 along D, nibbles as in `linear_w4`; scales float16
  [pages, page_tokens, KH, D / 32, 2] hold (scale, min) of a group.

`models` writes with `kv_write`; attention_paged.py reads.
"""

import torch

from kernels.reference.linear_int8 import quantize_rowwise_int8
from kernels.reference.linear_w4 import RUN, pack_nibbles, unpack_nibbles

STEPS = 15  # between the 16 levels of 4 bits


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
        numbers, scale = _store(new[kept], cache.dtype)
        cache.view(-1, *cache.shape[2:])[rows] = numbers
        if scale is not None:
            assert scales is not None
            scales.view(-1, *scales.shape[2:])[rows] = scale


def quantize_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D], D a multiple of 32 -> (uint8 [..., D / 2], float16 [..., D / 32, 2]).

    min is the least of a group, rounded to half; scale = (largest - min) / 15, rounded to half;
    q = (x - min) / scale, in float32, rounded half to even, within 0..15, and 0 unless scale > 0:
    it may fall below 0 when a group's values are as good as equal and min is rounded up.
    """
    groups = torch.unflatten(x.float(), -1, (-1, RUN))
    low = groups.amin(-1).half()
    scale = ((groups.amax(-1) - low.float()) / STEPS).half()
    divisors = torch.where(scale > 0, scale.float(), torch.inf)[..., None]
    q = ((groups - low.float()[..., None]) / divisors).round().clamp(0, STEPS)
    return pack_nibbles(q.flatten(-2)), torch.stack((scale, low), dim=-1)


def _store(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, KH, D] -> the numbers that a cache of dtype holds, and their scales."""
    if dtype.is_floating_point:
        return x.to(dtype), None
    if dtype == torch.int8:
        q, scales = quantize_rowwise_int8(x.reshape(-1, x.shape[-1]))
        return q.view(x.shape), scales.view(x.shape[:2])
    if dtype == torch.uint8:
        return quantize_int4(x)
    raise ValueError(
        f"a cache of {dtype} is not known; accepted are float32, float16, bfloat16, int8 and "
        "uint8 (two 4-bit values in each)."
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
    scale, low = scales.to(dtype).unbind(-1)
    groups = torch.unflatten(unpack_nibbles(cache).to(dtype), -1, (-1, RUN))
    return (groups * scale[..., None] + low[..., None]).flatten(-2)
