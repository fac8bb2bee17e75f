"""All weights of a model in one flat buffer, and gradients in another of the same order.

So a step sums its gradient over workers in one call, clips it in one, and updates all weights in
one. The model's parameters are views into the buffers. Matrices come first, so that what has weight
decay is one slice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.precision import master_dtype

EXTRA = 2
"""Further values behind the gradient that are summed with it: the loss, and votes to stop."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter is in the flat order: elements start to stop, of this shape."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


class FlatModel:
    """A model whose parameters live in `weights` (in its compute dtype), with `masters` (the same
    tensor where that is float32 or float64) and `gradient` in the masters' dtype.

    gradient: (elements,) view of `summed`, which has EXTRA more values. decayed: elements from the
    start on that weight decay applies to.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: torch.dtype,
        named: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """Takes over the model's parameters; their values are kept, masters in full precision.
        named: the same by other names, for a part of a model those that they have in the whole."""
        parameters = dict(model.named_parameters()) if named is None else named
        self.model, self.slots = model, tuple(slots_of(parameters))
        elements = self.slots[-1].stop
        self.decayed = sum(slot.stop - slot.start for slot in self.slots if len(slot.shape) > 1)
        wide = master_dtype(compute)
        self.masters = torch.cat([parameters[slot.name].data.flatten() for slot in self.slots])
        self.masters = self.masters.to(wide)
        self.weights = self.masters if compute == wide else self.masters.to(compute)
        self.summed = torch.zeros(elements + EXTRA, dtype=wide)
        self.gradient = self.summed[:elements]
        for slot in self.slots:
            parameter = parameters[slot.name]
            parameter.data = self.view(self.weights, slot)
            self._collect(parameter, self.view(self.gradient, slot))

    def view(self, flat: Tensor, slot: Slot) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in its shape."""
        return flat[slot.start : slot.stop].view(slot.shape)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """All such parts by the parameters' names."""
        return {slot.name: self.view(flat, slot) for slot in self.slots}

    def clear_gradient(self) -> None:
        """Zeroes the gradient and what is summed with it."""
        self.summed.zero_()

    def publish(self) -> None:
        """Rounds changed masters to the weights that are computed with."""
        if self.weights is not self.masters:
            self.weights.copy_(self.masters)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Sets masters from values by name, and weights from them."""
        for slot in self.slots:
            self.view(self.masters, slot).copy_(values[slot.name])
        self.publish()

    def _collect(self, parameter: nn.Parameter, place: Tensor) -> None:
        """Has autograd add the parameter's gradient to `place`, in the masters' precision."""
        if parameter.dtype == place.dtype:
            parameter.grad = place
            return

        def move(given: Tensor) -> None:
            assert given.grad is not None
            place.add_(given.grad)
            given.grad = None

        parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]


def slots_of(parameters: Mapping[str, nn.Parameter]) -> Iterator[Slot]:
    """In the model's own order, but matrices before vectors."""
    start = 0
    for name in sorted(parameters, key=lambda name: parameters[name].dim() < 2):
        shape = tuple(parameters[name].shape)
        stop = start + parameters[name].numel()
        yield Slot(name, start, stop, shape)
        start = stop
