"""Whole numbers of either sign as Elias gamma codes (1975) or in unary, without a loop over them.

Gamma writes v >= 1 as floor(log2 v) zeros and then v's binary digits, whose first is a one. Here
all zeros with their closing ones come first, then all other digits, then the signs of what is not
zero: the same bits in another order, in which the lengths are read off at once.

Three codes. GAMMA writes every number n, as v = |n| + 1. SPARSE writes only those that are not
zero: how far each is from the one before, then v = |n| (what QSGD does with few levels; Alistarh et
al. 2017, theorem 3.2). UNARY writes |n| zeros and a one, which is least where most are 0, 1 or 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HEADER = np.dtype([("unary_bits", "<u4"), ("digit_bits", "<u4")])

Whole = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint8]
Lengths = NDArray[np.int64]


class Code(NamedTuple):
    """bits_of: what numbers take, without header and filling; encode: header, then three runs of
    bits, each filled up to whole bytes; decode: so many numbers of a code; bytes after it are
    ignored."""

    bits_of: Callable[[Whole], int]
    encode: Callable[[Whole], Bytes]
    decode: Callable[[Bytes, int], Whole]


def _bits_gamma(numbers: Whole) -> int:
    return _gamma_bits(np.abs(numbers) + 1) + int(np.count_nonzero(numbers))


def _encode_gamma(numbers: Whole) -> Bytes:
    return _written(np.abs(numbers) + 1, numbers[numbers != 0])


def _decode_gamma(code: Bytes, count: int) -> Whole:
    values, rest = _read(code)
    assert len(values) == count, "a code of another number of values"
    return _signed(values - 1, rest)


def _bits_sparse(numbers: Whole) -> int:
    gaps, values = _sparse(numbers)
    return _gamma_bits(gaps) + _gamma_bits(np.abs(values)) + len(values)


def _encode_sparse(numbers: Whole) -> Bytes:
    gaps, values = _sparse(numbers)
    return _written(np.concatenate([gaps, np.abs(values)]), values)


def _decode_sparse(code: Bytes, count: int) -> Whole:
    both, rest = _read(code)
    gaps, values = np.split(both, 2)
    numbers = np.zeros(count, dtype=np.int32)
    numbers[np.cumsum(gaps) - 1] = _signed(values, rest)
    return numbers


def _bits_unary(numbers: Whole) -> int:
    return int(np.abs(numbers).sum()) + len(numbers) + int(np.count_nonzero(numbers))


def _encode_unary(numbers: Whole) -> Bytes:
    return _runs(np.abs(numbers).astype(np.int64), np.zeros(0, np.uint8), numbers[numbers != 0])


def _decode_unary(code: Bytes, count: int) -> Whole:
    zeros, _, rest = _split(code)
    assert len(zeros) == count, "a code of another number of values"
    return _signed(zeros.astype(np.int32), rest)


GAMMA = Code(_bits_gamma, _encode_gamma, _decode_gamma)
SPARSE = Code(_bits_sparse, _encode_sparse, _decode_sparse)
UNARY = Code(_bits_unary, _encode_unary, _decode_unary)


def _sparse(numbers: Whole) -> tuple[Whole, Whole]:
    """Of each number that is not zero: its place minus the place before (the first: plus 1)."""
    places = np.flatnonzero(numbers).astype(np.int32)
    return np.diff(places, prepend=np.int32(-1)), numbers[places]


def _gamma_bits(values: Whole) -> int:
    return int(2 * _lengths(values).sum()) + len(values)


def _written(values: Whole, signed: Whole) -> Bytes:
    """values: from 1 on; signed: numbers whose signs follow."""
    lengths = _lengths(values)
    offsets = np.cumsum(lengths) - lengths
    digits = np.zeros(int(lengths.sum()), dtype=np.uint8)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        shift = lengths[has] - 1 - place
        digits[offsets[has] + place] = (values[has] >> shift) & 1
    return _runs(lengths, digits, signed)


def _runs(zeros: Lengths, digits: Bits, signed: Whole) -> Bytes:
    """zeros: how many stand before each closing one."""
    ends = np.cumsum(zeros + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    unary[ends - 1] = 1
    header = np.array([(len(unary), len(digits))], dtype=HEADER)
    runs = [np.packbits(run) for run in (unary, digits, (signed < 0).astype(np.uint8))]
    return np.concatenate([header.view(np.uint8), *runs])


def _read(code: Bytes) -> tuple[Whole, Bytes]:
    """The values, from 1 on, and the bytes of the signs."""
    lengths, digits, rest = _split(code)
    offsets = np.cumsum(lengths) - lengths
    values = np.ones(len(lengths), dtype=np.int32)
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        values[has] = values[has] << 1 | digits[offsets[has] + place]
    return values, rest


def _split(code: Bytes) -> tuple[Lengths, Bits, Bytes]:
    """The zeros before each closing one, the digits, and the bytes of the signs."""
    header = code[: HEADER.itemsize].view(HEADER)[0]
    unary, rest = _bits(code[HEADER.itemsize :], int(header["unary_bits"]))
    digits, rest = _bits(rest, int(header["digit_bits"]))
    return np.diff(np.flatnonzero(unary), prepend=-1) - 1, digits, rest


def _signed(numbers: Whole, code: Bytes) -> Whole:
    """Numbers with the signs of those that are not zero."""
    other = np.flatnonzero(numbers)
    signs, _ = _bits(code, len(other))
    numbers[other] = np.where(signs == 1, -numbers[other], numbers[other])
    return numbers


def _bits(code: Bytes, count: int) -> tuple[Bits, Bytes]:
    """The first `count` bits, and the bytes after those that hold them."""
    whole = -(-count // 8)
    return np.unpackbits(code[:whole], count=count), code[whole:]


def _lengths(values: Whole) -> Lengths:
    """floor(log2 v), exact: a float64's exponent."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
