"""Tiles of a KV cache, as attention over pages takes them: tokens by a head's numbers.

Packed numbers are read in words of eight and come out in an order of their own (`columns`), two at
a time from the same shift and mask: no number is moved in registers. Everything is loaded four
bytes or more at once, so that it is fetched ahead. Formats: reference/kv_cache.py. Used by
attention_paged.py.
"""

import triton
import triton.language as tl

# Of two bfloat16 in whole numbers from 128 on, with no bit set.
WHOLE = tl.constexpr(0x43004300)


@triton.jit
def columns(PACKED: tl.constexpr, DP: tl.constexpr):
    """int32 [DP]: which of a head's numbers stands in each column of a tile; D or more: none. A
    word of a packed head is four bytes of a group; a tile has its low numbers, then its high ones,
    of each the even bytes before the odd."""
    column = tl.arange(0, DP)
    if PACKED:
        word, within = column // 8, column % 8
        byte = word % 4 * 4 + within // 2 % 2 + within % 2 * 2
        column = word // 4 * 32 + within // 4 * 16 + byte
    return column


@triton.jit
def _group_scales(scales, scale_at, seen, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """float32 [BN, DP / 32]: the scales of groups. scales: float16, or two of them in an int32,
    which are fetched ahead; two bytes alone would not be."""
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
    return scale


@triton.jit
def _fifths(words, at, seen, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """(low, high) int32 [BN, DP / 8]: for the four low and the four high numbers of each word their
    fifth bits: of the even bytes at 4 and 20, of the odd ones at 5 and 21; other bits are set, too.
    A group's are the bits of a word, those of its high numbers in the upper half."""
    group = tl.arange(0, DP // 32)[None, :]
    ok = seen[:, None] if D == DP else seen[:, None] & (group < D // 32)
    bits = tl.load(words + at[:, None] // 4 + D // 8 + group, mask=ok, other=0)
    each = tl.broadcast_to(bits[:, :, None], (BN, DP // 32, 4))
    four = tl.reshape(each, (BN, DP // 8)) >> (tl.arange(0, DP // 8) % 4 * 4)[None, :]
    # To two places at once: the bits of bytes 0 and 1 stay the lower ones, those of 2 and 3 do not.
    spread: tl.constexpr = (1 << 4) | (1 << 18)
    return (four & 15) * spread, ((four >> 16) & 15) * spread


@triton.jit
def cached_tile(
    cache, words, scales, at, scale_at, seen, whole,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """[BN, DP], the tokens at cache + at: as they are stored, BITS bits as float32. words: a packed
    cache in int32. whole: WHOLE, but not known when compiling: with two constants an instruction
    more would be spent on every pair of numbers."""
    if cache.dtype.element_ty == tl.uint8:
        place = tl.arange(0, DP // 8)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (place < D // 8)
        word = tl.load(words + at[:, None] // 4 + place, mask=ok, other=0)
        pair: tl.constexpr = 0x000F000F
        low, low_odd = (word & pair) | whole, ((word >> 8) & pair) | whole
        high, high_odd = ((word >> 4) & pair) | whole, ((word >> 12) & pair) | whole
        if BITS == 5:
            below, above = _fifths(words, at, seen, D, DP, BN)
            fifth: tl.constexpr = 0x00100010
            low, low_odd = low | (below & fifth), low_odd | ((below >> 1) & fifth)
            high, high_odd = high | (above & fifth), high_odd | ((above >> 1) & fifth)
        # [BN, DP / 8, low or high, even or odd], and behind them which half.
        pairs = tl.join(tl.join(low, high), tl.join(low_odd, high_odd))
        first = (pairs << 16).to(tl.float32, bitcast=True)
        second = (pairs & -65536).to(tl.float32, bitcast=True)
        numbers = tl.reshape(tl.join(first, second), (BN, DP // 32, 32))
        scale = _group_scales(scales, scale_at, seen, D, DP, BN)
        zero = scale * -(128.0 + 2 ** (BITS - 1))
        found = tl.reshape(numbers * scale[:, :, None] + zero[:, :, None], (BN, DP))
    else:
        column = tl.arange(0, DP)[None, :]
        ok = seen[:, None] if D == DP else seen[:, None] & (column < D)
        found = tl.load(cache + at[:, None] + column, mask=ok, other=0)
    return found
