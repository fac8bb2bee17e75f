"""Whole numbers of either sign as Elias gamma codes (1975), without a loop over numbers.

Gamma writes v >= 1 as floor(log2 v) zeros and then v's binary digits, whose first is a one. Here
all zeros with their closing ones come first, then all other digits, then the signs of what is not
zero: the same bits in another order, in which the lengths are read off at once. A number n has
v = |n| + 1.
"""

import numpy as np
from numpy.typing import NDArray

HEADER = np.dtype([("unary_bits", "<u4"), ("digit_bits", "<u4")])

Whole = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint8]


def bits_of(numbers: Whole) -> int:
    """What the codes take, without header and filling."""
    lengths = _lengths(np.abs(numbers) + 1)
    return int(2 * lengths.sum()) + len(numbers) + int(np.count_nonzero(numbers))


def encode(numbers: Whole) -> Bytes:
    """Header, then three runs of bits, each filled up to whole bytes."""
    values = np.abs(numbers) + 1
    lengths = _lengths(values)
    ends = np.cumsum(lengths + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    unary[ends - 1] = 1
    offsets = np.cumsum(lengths) - lengths
    digits = np.zeros(int(lengths.sum()), dtype=np.uint8)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        shift = lengths[has] - 1 - place
        digits[offsets[has] + place] = (values[has] >> shift) & 1
    signs = (numbers[numbers != 0] < 0).astype(np.uint8)
    header = np.array([(len(unary), len(digits))], dtype=HEADER)
    runs = [np.packbits(run) for run in (unary, digits, signs)]
    return np.concatenate([header.view(np.uint8), *runs])


def decode(code: Bytes, count: int) -> Whole:
    """The `count` numbers of a code."""
    header = code[: HEADER.itemsize].view(HEADER)[0]
    rest = code[HEADER.itemsize :]
    unary, rest = _bits(rest, int(header["unary_bits"]))
    digits, rest = _bits(rest, int(header["digit_bits"]))
    ends = np.flatnonzero(unary)
    lengths = np.diff(ends, prepend=-1) - 1
    assert len(lengths) == count, "a code of another number of values"
    offsets = np.cumsum(lengths) - lengths
    values = np.ones(count, dtype=np.int32)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        values[has] = values[has] << 1 | digits[offsets[has] + place]
    numbers: Whole = values - 1
    other = np.flatnonzero(numbers)
    signs, _ = _bits(rest, len(other))
    numbers[other] = np.where(signs == 1, -numbers[other], numbers[other])
    return numbers


def _bits(code: Bytes, count: int) -> tuple[Bits, Bytes]:
    """The first `count` bits, and the bytes after those that hold them."""
    whole = -(-count // 8)
    return np.unpackbits(code[:whole], count=count), code[whole:]


def _lengths(values: Whole) -> NDArray[np.int64]:
    """floor(log2 v), exact: a float64's exponent."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
