"""The matrices of a decoder on a device: as quantised as the checkpoint has them, or plain.

A fused matrix (queries, keys and values; gate and up) is one where its parts are of one kind, else
a few whose results are put side by side. `models.load.device` makes them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.device.ops import Ops


class W4(NamedTuple):
    """4 bits in groups; see kernels/reference/linear_w4.py."""

    qweight: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None


class W8(NamedTuple):
    """8 bits in groups; see kernels/reference/linear_w8.py."""

    qweight: torch.Tensor
    scales: torch.Tensor


class Plain(NamedTuple):
    """weight [N, K] of the dtype that the decoder computes in."""

    weight: torch.Tensor


Matrix = W4 | W8 | Plain


def out_rows(matrix: Matrix) -> int:
    """N of a matrix [N, K]."""
    return matrix[0].shape[0]


def multiply(
    ops: Ops, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] times the transposed matrix, plus bias [N] -> [M, N] of x's dtype."""
    if isinstance(matrix, W4):
        return ops.w4_linear(x, *matrix, bias)
    if isinstance(matrix, W8):
        return ops.w8_linear(x, *matrix, bias)
    return F.linear(x, matrix.weight, bias)


def multiply_fused(
    ops: Ops, x: torch.Tensor, parts: Sequence[Matrix], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `multiply` with the matrices one below the other."""
    if len(parts) == 1:
        return multiply(ops, x, parts[0], bias)
    sizes = [out_rows(part) for part in parts]
    biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
    made = [multiply(ops, x, part, each) for part, each in zip(parts, biases, strict=True)]
    return torch.cat(made, dim=1)


def rows(ops: Ops, ids: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Rows ids [T] of a matrix [N, K] -> [T, K] of dtype: an embedding."""
    picked = [None if part is None else part.index_select(0, ids) for part in matrix]
    if isinstance(matrix, W4):
        return ops.dequantize_w4(*picked, dtype)
    if isinstance(matrix, W8):
        return ops.dequantize_w8(*picked, dtype)
    weight = picked[0]
    assert weight is not None
    return weight.to(dtype)


def stacked(parts: Sequence[Matrix]) -> list[Matrix]:
    """Neighbours of one kind one below the other, so that one product does for them."""
    made: list[Matrix] = []
    for part in parts:
        if made and _alike(made[-1], part):
            made[-1] = _joined(made[-1], part)
        else:
            made.append(part)
    return made


def _joined(one: Matrix, other: Matrix) -> Matrix:
    return type(one)._make(
        None if a is None or b is None else torch.cat((a, b))
        for a, b in zip(one, other, strict=True)
    )


def _alike(one: Matrix, other: Matrix) -> bool:
    """Whether both can be one matrix: of one kind, with groups of one size and scales of one
    dtype."""
    return type(one) is type(other) and all(
        (a is None) == (b is None)
        and (a is None or b is None or (a.dtype == b.dtype and a.shape[1:] == b.shape[1:]))
        for a, b in zip(one, other, strict=True)
    )


def size_bytes(matrix: Matrix) -> int:
    """Of device memory."""
    return sum(part.numel() * part.element_size() for part in matrix if part is not None)
