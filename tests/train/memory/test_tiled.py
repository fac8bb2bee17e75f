"""Matrices a tile at a time, against torch's own linear and embedding in float64."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.memory.tiled import look_up, look_up_backward, product, spans


@dataclass
class Held:
    """Tiles of a matrix in memory, and the most elements that were asked for at once."""

    matrix: Tensor
    height: int
    gradient: Tensor = field(init=False)
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows, self.columns = self.matrix.shape
        self.gradient = torch.zeros_like(self.matrix)

    def tile(self, number: int) -> Tensor:
        found = self.matrix[number * self.height : (number + 1) * self.height]
        self.asked.append(found.numel())
        return found.clone()

    def add_gradient(self, number: int, gradient: Tensor) -> None:
        self.gradient[number * self.height : (number + 1) * self.height] += gradient


def held(height: int) -> Held:
    generator = torch.Generator().manual_seed(0)
    return Held(torch.randn(10, 6, dtype=torch.float64, generator=generator), height)


@pytest.mark.parametrize("height", [1, 4, 10, 99])
def test_a_product_is_a_linear(height: int):
    tiles = held(height)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = tiles.matrix.clone().requires_grad_()
    expected = functional.linear(x, weight)
    back = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, weight), back)
    out = product(x, tiles)
    (found,) = torch.autograd.grad(out, x, back)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found, wanted[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(tiles.gradient, wanted[1], rtol=0, atol=1e-13)
    assert max(tiles.asked) == min(height, 10) * 6
    assert len(tiles.asked) == 2 * len(spans(tiles))


@pytest.mark.parametrize("height", [3, 10])
def test_looking_up_is_an_embedding(height: int):
    tiles = held(height)
    ids = torch.tensor([[0, 9, 3], [3, 3, 5]])
    weight = tiles.matrix.clone().requires_grad_()
    expected = functional.embedding(ids, weight)
    back = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, weight, back)
    assert torch.equal(look_up(ids, tiles), expected)
    look_up_backward(ids, back, tiles)
    torch.testing.assert_close(tiles.gradient, wanted, rtol=0, atol=1e-13)
