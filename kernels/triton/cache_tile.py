"""Tiles of a KV cache, as attention over pages takes them: tokens by a head's numbers.

Packed numbers keep the order of their bytes. Everything is loaded four bytes or more at once, so
that it is fetched ahead. Formats: reference/kv_cache.py. Used by attention_paged.py.
"""

import triton
import triton.language as tl

WHOLE = tl.constexpr(0x4B000000)  # of a float32 in whole numbers from 2 ** 23 on, with no bit set


@triton.jit
def columns(PACKED: tl.constexpr, DP: tl.constexpr):
    """int32 [DP]: which of a head's numbers stands in each column of a tile; D or more: none. The
    two of a byte are neighbours in a tile, and 16 apart in a head."""
    column = tl.arange(0, DP)
    if PACKED:
        byte = column // 2
        column = byte // 16 * 32 + byte % 16 + column % 2 * 16
    return column


@triton.jit
def _of_bytes(each, DP: tl.constexpr, BN: tl.constexpr):
    """[BN, DP / 32] of groups -> [BN, DP / 2]: that of each byte's group."""
    return tl.reshape(tl.broadcast_to(each[:, :, None], (BN, DP // 32, 16)), (BN, DP // 2))


@triton.jit
def _group_scales(scales, scale_at, seen, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """float32 [BN, DP / 2]: the scale of each byte's group of 32 numbers. scales: float16, or two
    of them in an int32, which are fetched ahead; two bytes alone would not be."""
    if scales.dtype.element_ty == tl.int32:
        place = tl.arange(0, DP // 64)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (place < D // 64)
        both = tl.load(scales + scale_at[:, None] + place, mask=ok, other=0)
        even = (both & 65535).to(tl.int16).to(tl.float16, bitcast=True)
        odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        scale = tl.reshape(tl.join(even, odd), (BN, DP // 32)).to(tl.float32)
    else:
        place = tl.arange(0, DP // 32)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (place < D // 32)
        scale = tl.load(scales + scale_at[:, None] + place, mask=ok, other=0.0).to(tl.float32)
    return _of_bytes(scale, DP, BN)


@triton.jit
def _fifths(words, at, seen, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """(low, high) int32 [BN, DP / 2]: the fifth bits, as 16 or 0, of both numbers of each byte. A
    group's are the bits of a word, those of its high numbers in the upper half."""
    group = tl.arange(0, DP // 32)[None, :]
    ok = seen[:, None] if D == DP else seen[:, None] & (group < D // 32)
    word = tl.load(words + at[:, None] // 4 + D // 8 + group, mask=ok, other=0)
    word = _of_bytes(word, DP, BN) >> (tl.arange(0, DP // 2) % 16)[None, :]
    return (word & 1) << 4, (word >> 12) & 16


@triton.jit
def cached_tile(
    cache, words, scales, at, scale_at, seen, whole,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """[BN, DP], the tokens at cache + at: as they are stored, BITS bits as float32. words: a cache
    of 5 bits in int32."""
    if cache.dtype.element_ty == tl.uint8:
        byte = tl.arange(0, DP // 2)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (byte < D // 2)
        levels = tl.load(cache + at[:, None] + byte, mask=ok, other=0).to(tl.int32)
        scale = _group_scales(scales, scale_at, seen, D, DP, BN)
        if BITS == 5:
            below, above = _fifths(words, at, seen, D, DP, BN)
            low, high = levels & 15 | below, levels >> 4 | above
            high_scale = scale
        else:
            # The high ones stay 16 times too large.
            low, high = levels & 15, levels & 240
            high_scale = scale * 0.0625
        # As linear_w4.py makes floats of levels.
        zero: tl.constexpr = 2 ** (BITS - 1)
        high_zero: tl.constexpr = zero if BITS == 5 else zero * 16
        low = (low | whole).to(tl.float32, bitcast=True) - (8388608.0 + zero)
        high = (high | whole).to(tl.float32, bitcast=True) - (8388608.0 + high_zero)
        found = tl.reshape(tl.join(low * scale, high * high_scale), (BN, DP))
    else:
        column = tl.arange(0, DP)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (column < D)
        found = tl.load(cache + at[:, None] + column, mask=ok, other=0)
    return found
