"""Deep Gradient Compression (Lin et al., ICLR 2018): each rank sends the largest few of what it has
gathered up, and keeps the rest.

What is gathered up is not the gradient but its momentum (correction), whose sent values start anew
(factor masking); the gradient is clipped before (locally), and the share that is sent falls from a
quarter to `ratio` over the warm-up. The momentum is all in here: the optimizer has none.
"""

import math

import torch
from torch import Tensor

from train.communication.compressor import Memory, Part, added
from train.communication.transport import Transport

WARMUP_FACTOR = 0.25
"""75 % of values are left out in the first part of the warm-up, 93.75 % in the second ..."""
WARMUP_PARTS = 4
INDEX_BYTES = 4


class DeepGradient:
    """ratio: share of each tensor's values that is sent; 1: all, which is momentum SGD.

    correction: momentum is gathered up, rather than gradients whose momentum starts when they come;
    masking: the momentum of what was sent starts anew.
    """

    clips_locally = True

    def __init__(
        self,
        ratio: float,
        momentum: float,
        warmup_steps: int,
        *,
        correction: bool = True,
        masking: bool = True,
    ) -> None:
        self.memory = Memory()
        self.ratio, self.momentum, self.warmup_steps = ratio, momentum, warmup_steps
        self.correction, self.masking = correction, masking

    def density(self, step: int) -> float:
        """The share that is sent in step `step` (from 1)."""
        if step > self.warmup_steps:
            return self.ratio
        part = WARMUP_PARTS * (step - 1) // self.warmup_steps
        return max(self.ratio, WARMUP_FACTOR ** (1 + part))

    def reduce(self, part: Part, local: Tensor, transport: Transport, step: int) -> Tensor:
        """See `Compressor`; what comes out is a step of SGD, its momentum included."""
        velocity = self._kept("velocity", part, local) * self.momentum + local
        density = self.density(step)
        if density >= 1 or transport.size == 1:
            return self._all_of_it(part, velocity, transport)
        gathered = self._kept("accumulated", part, local) + (velocity if self.correction else local)
        chosen = self._largest(part, gathered, density)
        payload = _packed(gathered[chosen], chosen)
        gathered[chosen] = 0
        if self.masking:
            velocity[chosen] = 0
        if self.correction:
            self.memory.stage(f"velocity/{part.key}", velocity)
        self.memory.stage(f"accumulated/{part.key}", gathered)
        total = added(
            transport.all_gather(payload), lambda row: _spread(row, chosen.numel(), local)
        )
        return total if self.correction else self._late(part, total)

    def formula_bytes(self, part: Part, size: int, item_bytes: int) -> float:
        """Value and index of each chosen one, to every other rank."""
        chosen = sum(math.ceil(self.ratio * (stop - start)) for start, stop in part.spans)
        if self.ratio >= 1:
            return 2 * part.elements * item_bytes * (size - 1) / size
        return (size - 1) * chosen * (item_bytes + INDEX_BYTES)

    def memory_values(self, part: Part, size: int) -> int:
        """Momentum, and what is gathered up."""
        return 2 * part.elements

    def _kept(self, kind: str, part: Part, like: Tensor) -> Tensor:
        kept = self.memory.kept.get(f"{kind}/{part.key}")
        return torch.zeros_like(like) if kept is None else kept

    def _all_of_it(self, part: Part, velocity: Tensor, transport: Transport) -> Tensor:
        """Momentum as it is, nothing masked, and what an earlier step kept back."""
        self.memory.stage(f"velocity/{part.key}", velocity)
        total = velocity + self._kept("accumulated", part, velocity)
        self.memory.stage(f"accumulated/{part.key}", torch.zeros_like(total))
        transport.all_reduce(total)
        return total

    def _late(self, part: Part, total: Tensor) -> Tensor:
        """Without correction: momentum of what has come, the same on every rank."""
        velocity = self._kept("velocity", part, total) * self.momentum + total
        self.memory.stage(f"velocity/{part.key}", velocity)
        return velocity

    def _largest(self, part: Part, gathered: Tensor, density: float) -> Tensor:
        """Indices of each tensor's largest, at least one of each, as many on every rank."""
        found = []
        for start, stop in part.spans:
            count = math.ceil(density * (stop - start))
            top = gathered[start:stop].abs().topk(count, sorted=False).indices
            found.append(top + start)
        return torch.cat(found)


def _packed(values: Tensor, indices: Tensor) -> Tensor:
    """Values in their dtype, then indices in 32 bits; uint8."""
    assert not indices.numel() or int(indices.max()) < 1 << 31
    return torch.cat([values.view(torch.uint8), indices.int().view(torch.uint8)])


def _spread(payload: Tensor, count: int, like: Tensor) -> Tensor:
    """A payload's values at their places, zeros elsewhere."""
    border = count * like.element_size()
    values = payload[:border].clone().view(like.dtype)
    indices = payload[border:].clone().view(torch.int32).long()
    return torch.zeros_like(like).index_put_((indices,), values)
