"""Mesa (Pan et al. 2021): exact forward passes, activations saved in 8 bits for the backward pass.

Each head of each saved tensor has a range of its own, a running mean of what passes through it, so
that ranges are two numbers a head; what is beyond them is cut off.
"""

from typing import Any

import torch
from torch import Tensor

from train.memory.codec import Codes, encode, grid_between
from train.memory.saved import Form

DECAY = 0.9
BITS = 8


class Mesa:
    """A `Codec`. ranges: by place, (heads, 2) float64 lows and highs that are running means."""

    def __init__(self) -> None:
        self.ranges: dict[str, Tensor] = {}
        self.generator = torch.Generator()

    def encode(self, place: str, flat: Tensor, form: Form) -> Codes:
        """See `Codec`."""
        rows = flat.view(form.outer, form.heads, form.inner)
        seen = torch.stack([rows.amin((0, 2)), rows.amax((0, 2))], dim=1).double()
        kept = self.ranges.get(place)
        if kept is None or kept.shape != seen.shape:
            kept = seen
        self.ranges[place] = kept * DECAY + seen * (1 - DECAY)
        low, high = self.ranges[place].unbind(1)
        grid = grid_between(low, high, BITS, form.inner)
        return encode(flat, BITS, self.generator, grid)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {place: ranges.tolist() for place, ranges in self.ranges.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.ranges = {
            place: torch.tensor(ranges, dtype=torch.float64) for place, ranges in state.items()
        }
