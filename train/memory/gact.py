"""GACT (Liu et al. 2022): each saved tensor in as many bits as its effect on the gradient deserves.

A tensor's sensitivity is the gradient's variance when it alone is saved in one bit. Bits are then
shared out so that the variances add up to the least (`allocate.py`), now and again, since
sensitivities change as a model learns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.memory.allocate import allocate
from train.memory.codec import Codes, encode
from train.memory.saved import Codec, Form

ADAPT_EVERY = 1000
"""Forward passes between two allocations, as published."""
Gradient = Callable[[Codec], Sequence[Tensor]]
"""The gradient of one loss, with what is saved in a codec's form."""


class Gact:
    """A `Codec`. bits: by place; before the first allocation, the mean's whole part."""

    def __init__(self, mean_bits: float, every: int = ADAPT_EVERY) -> None:
        self.mean_bits, self.every = mean_bits, every
        self.bits: dict[str, int] = {}
        self.passes = 0
        self.generator = torch.Generator()

    def encode(self, place: str, flat: Tensor, form: Form) -> Codes:
        """See `Codec`."""
        return encode(flat, self.bits.get(place, int(self.mean_bits)), self.generator)

    def due(self) -> bool:
        """Counts a forward pass; whether bits are to be shared out before it."""
        self.passes += 1
        return (self.passes - 1) % self.every == 0

    def adapt(self, gradient: Gradient, seed: int) -> None:
        """Shares the bits out anew."""
        sizes = Sizes()
        gradient(sizes)
        self.bits = allocate(sensitivities(gradient, sizes.elements, seed), sizes.elements,
                             self.mean_bits)  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"bits": self.bits, "passes": self.passes}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.bits, self.passes = dict(state["bits"]), state["passes"]


class Sizes:
    """A `Codec` that keeps everything as it is and notes how large it is."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = {}

    def encode(self, place: str, flat: Tensor, form: Form) -> None:
        """See `Codec`."""
        self.elements[place] = flat.numel()


@dataclass
class OneBit:
    """A `Codec` that saves one place in one bit and all else as it is."""

    place: str
    generator: torch.Generator

    def encode(self, place: str, flat: Tensor, form: Form) -> Codes | None:
        """See `Codec`."""
        return encode(flat, 1, self.generator) if place == self.place else None


def sensitivities(gradient: Gradient, places: Mapping[str, int], seed: int) -> dict[str, float]:
    """The gradient's variance for each place in one bit: half the squared distance of two draws."""
    found = {}
    for number, place in enumerate(places):
        draws = []
        for draw in range(2):
            generator = torch.Generator().manual_seed((seed + 2 * number + draw) % (1 << 63))
            draws.append(gradient(OneBit(place, generator)))
        squares = [(a.double() - b.double()).square().sum() for a, b in zip(*draws, strict=True)]
        found[place] = float(torch.stack(squares).sum()) / 2
    return found
