"""Activations in few bits, rounded by chance so that they are right on average.

A number between two neighbouring levels becomes the upper one with the probability of its distance
from the lower one (stochastic rounding; Chen et al., ActNN, 2021), so that a gradient which is
linear in what was saved has the mean of the exact one. `Grid` holds where levels are; the codes are
packed (`packing.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from train.memory.packing import pack, unpack

GROUP = 256
"""Numbers that share a range (GACT, Liu et al. 2022)."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Levels low + k x step for numbers seen as (outer, groups, inner), or (groups, inner) with
    outer 1. low, step: (groups,) float32."""

    low: Tensor
    step: Tensor
    inner: int


@dataclass(frozen=True, eq=False)
class Codes:
    """A flat tensor of `count` numbers in `bits` bits each, and the ranges of its groups."""

    packed: Tensor
    grid: Grid
    bits: int
    count: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of codes and ranges."""
        return self.packed.numel() + self.grid.low.nbytes + self.grid.step.nbytes

    def decode(self) -> Tensor:
        """(count,) numbers near those that were saved."""
        grid = self.grid
        padded = -self.count % (grid.low.numel() * grid.inner)
        codes = unpack(self.packed, self.bits, self.count + padded)
        rows = codes.view(-1, grid.low.numel(), grid.inner).to(torch.float32)
        rows = rows.mul_(grid.step[:, None]).add_(grid.low[:, None])
        return rows.view(-1)[: self.count].to(self.dtype)


def grid_between(low: Tensor, high: Tensor, bits: int, inner: int) -> Grid:
    """The grid of 2**bits levels that holds all of [low, high] in spite of its float32 ranges: low
    is rounded down, the step up. low, high: (groups,)."""
    below = _towards(low, -math.inf)
    width = (high.double() - below.double()) / (2**bits - 1)
    step = _towards(width, math.inf).clamp_(min=torch.finfo(torch.float32).tiny)
    return Grid(below, step, inner)


def encode(flat: Tensor, bits: int, generator: torch.Generator, grid: Grid | None = None) -> Codes:
    """flat: (n,) numbers. grid: None for ranges of each GROUP numbers, as they are; what is beyond
    a given grid goes to its end. ValueError where a number is not finite."""
    count = flat.numel()
    padding = -count % (GROUP if grid is None else grid.low.numel() * grid.inner)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    if padding:
        wide = torch.cat([wide, wide[-1:].expand(padding)])
    if grid is None:
        rows = wide.view(-1, GROUP)
        grid = grid_between(rows.amin(1), rows.amax(1), bits, GROUP)
    rows = wide.view(-1, grid.low.numel(), grid.inner)
    places = (rows - grid.low[:, None]) / grid.step[:, None]
    places += noise(places, generator)
    codes = places.floor_().clamp_(0, 2**bits - 1).to(torch.uint8).view(-1)
    return Codes(pack(codes, bits), grid, bits, count, flat.dtype)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): what makes rounding right on average."""
    return torch.rand(like.shape, dtype=like.dtype, generator=generator)


def _towards(values: Tensor, end: float) -> Tensor:
    """float32 that are not beyond the values on the other side of `end`."""
    near = values.float()
    wrong = near.double() > values.double() if end < 0 else near.double() < values.double()
    return torch.where(wrong, torch.nextafter(near, torch.full_like(near, end)), near)
