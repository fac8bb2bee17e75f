"""How a model lies in files: stretches that are read and written as wholes.

A layer's parameters are one segment, but for matrices larger than a tile, of which each tile of
rows is one; so are embedding and output matrix. Segments begin at multiples of BLOCK elements, as
O_DIRECT wants it, and tiles of a matrix follow each other without gaps: a parameter is one stretch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from models.config import ModelConfig
from train.layout import Slot
from train.model import Layer

BLOCK = 2048
"""Elements: 4096 bytes of the narrowest dtype."""
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Segment:
    """Elements start to start + padded of every file; `elements` of them mean something, the first
    `decayed` of which have weight decay. slots: places within, relative to its start."""

    number: int
    start: int
    elements: int
    decayed: int
    slots: tuple[Slot, ...]

    @property
    def padded(self) -> int:
        """Elements to the next block."""
        return -(-self.elements // BLOCK) * BLOCK


@dataclass(frozen=True)
class Matrix:
    """A matrix in tiles of `rows` rows (the last has what is left), one segment each."""

    name: str
    shape: tuple[int, int]
    rows: int
    tiles: tuple[Segment, ...]


@dataclass(frozen=True)
class Layout:
    """Of a whole model. layers: the segment of each layer's small parameters; matrices: what is in
    tiles, by name; slots: every parameter's place in a file, in the order of the files."""

    config: ModelConfig
    segments: tuple[Segment, ...]
    layers: tuple[Segment, ...]
    norm: Segment
    matrices: dict[str, Matrix]
    slots: tuple[Slot, ...]

    @property
    def elements(self) -> int:
        """Of a file, gaps counted."""
        last = self.segments[-1]
        return last.start + last.padded

    @property
    def head(self) -> Matrix:
        """The output matrix, which may be the embedding."""
        return self.matrices[EMBEDDING if self.config.tied_head else HEAD]


class _Builder:
    """Lays segments one behind the other."""

    def __init__(self, tile_elements: int) -> None:
        self.tile_elements = tile_elements
        self.segments: list[Segment] = []
        self.slots: list[Slot] = []
        self.end = 0

    def add(self, parameters: list[tuple[str, tuple[int, ...]]]) -> Segment:
        """A segment of whole parameters, matrices first."""
        places, at, decayed = [], 0, 0
        for name, shape in sorted(parameters, key=lambda found: len(found[1]) < 2):
            places.append(Slot(name, at, at + math.prod(shape), shape))
            at += math.prod(shape)
            decayed = at if len(shape) > 1 else decayed
        self.slots += [
            Slot(slot.name, self.end + slot.start, self.end + slot.stop, slot.shape)
            for slot in places
        ]
        return self._put(at, decayed, tuple(places))

    def add_matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """A matrix in tiles whose sizes are whole blocks, but for the last."""
        height, width = shape
        least = BLOCK // math.gcd(BLOCK, width)
        rows = min(height, max(1, self.tile_elements // width // least) * least)
        self.slots.append(Slot(name, self.end, self.end + height * width, shape))
        tiles = []
        for first in range(0, height, rows):
            elements = min(rows, height - first) * width
            tiles.append(self._put(elements, elements, ()))
        return Matrix(name, shape, rows, tuple(tiles))

    def _put(self, elements: int, decayed: int, slots: tuple[Slot, ...]) -> Segment:
        segment = Segment(len(self.segments), self.end, elements, decayed, slots)
        self.segments.append(segment)
        self.end += segment.padded
        return segment


def lay_out(config: ModelConfig, tile_elements: int) -> Layout:
    """The layout of a model of this shape, of tiles of about tile_elements."""
    builder, matrices = _Builder(tile_elements), {}
    large = (config.vocab, config.hidden)
    matrices[EMBEDDING] = builder.add_matrix(EMBEDDING, large)
    layers = []
    for number in range(config.layers):
        small = []
        for name, shape in _layer_parameters(config):
            whole = f"model.layers.{number}.{name}"
            if len(shape) == 2 and math.prod(shape) > tile_elements:
                matrices[whole] = builder.add_matrix(whole, (shape[0], shape[1]))
            else:
                small.append((whole, shape))
        layers.append(builder.add(small))
    norm = builder.add([(NORM, (config.hidden,))])
    if not config.tied_head:
        matrices[HEAD] = builder.add_matrix(HEAD, large)
    return Layout(
        config, tuple(builder.segments), tuple(layers), norm, matrices, tuple(builder.slots)
    )


def _layer_parameters(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        layer = Layer(config)
    for name, parameter in layer.named_parameters():
        yield name, tuple(parameter.shape)
