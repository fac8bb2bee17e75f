"""Matrices larger than memory has room for, computed a tile of rows at a time (ZeRO-Infinity's
memory-centric tiling): never more than one tile and its gradient are there.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tiles(Protocol):
    """A matrix (rows, columns) whose tiles of `height` rows are fetched one by one."""

    rows: int
    columns: int
    height: int

    def tile(self, number: int) -> Tensor:
        """(rows of it, columns); valid until the next call."""
        ...

    def add_gradient(self, number: int, gradient: Tensor) -> None:
        """Adds to the tile's gradient."""
        ...


def spans(tiles: Tiles) -> list[slice]:
    """The rows of each tile."""
    firsts = range(0, tiles.rows, tiles.height)
    return [slice(first, min(first + tiles.height, tiles.rows)) for first in firsts]


class _Product(torch.autograd.Function):
    """x W^T. Saves x alone; tiles come again for the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, tiles: Tiles) -> Tensor:
        context.save_for_backward(x)
        context.tiles = tiles
        out = x.new_empty(*x.shape[:-1], tiles.rows)
        for number, span in enumerate(spans(tiles)):
            out[..., span] = functional.linear(x, tiles.tile(number))
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), tiles = context.saved_tensors, context.tiles
        flat = x.flatten(0, -2)
        back = torch.zeros_like(x)
        for number, span in enumerate(spans(tiles)):
            part = gradients[0][..., span]
            back += part @ tiles.tile(number)
            tiles.add_gradient(number, part.flatten(0, -2).t() @ flat)
        return back, None


class TiledLinear(nn.Module):
    """A linear without parameters of its own, in place of nn.Linear. bias: as that has it."""

    def __init__(self, tiles: Tiles, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.tiles = tiles
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) in, (..., rows) out."""
        out: Tensor = product(x, self.tiles)
        return out if self.bias is None else out + self.bias


def product(x: Tensor, tiles: Tiles) -> Tensor:
    """x (..., columns) times the matrix' transpose."""
    out: Tensor = _Product.apply(x, tiles)  # type: ignore[no-untyped-call]
    return out


def look_up(ids: Tensor, tiles: Tiles) -> Tensor:
    """Rows of the matrix: (..., columns) for ids (...)."""
    out: Tensor | None = None
    for number, span in enumerate(spans(tiles)):
        tile = tiles.tile(number)
        out = tile.new_empty(*ids.shape, tiles.columns) if out is None else out
        here = (ids >= span.start) & (ids < span.stop)
        out[here] = tile[ids[here] - span.start]
    assert out is not None
    return out


def look_up_backward(ids: Tensor, gradient: Tensor, tiles: Tiles) -> None:
    """Adds the gradient (..., columns) of looked-up rows to the tiles'."""
    for number, span in enumerate(spans(tiles)):
        here = (ids >= span.start) & (ids < span.stop)
        whole = gradient.new_zeros(span.stop - span.start, tiles.columns)
        whole.index_add_(0, ids[here] - span.start, gradient[here])
        tiles.add_gradient(number, whole)
