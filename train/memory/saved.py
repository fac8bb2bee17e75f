"""What a layer saves for its backward pass, in the form that a codec gives it.

`SavedAs` is a context of torch's saved_tensors_hooks. A tensor that several operations save is kept
once. Kept as they are: weights, what came from outside the layer (angles of positions), integers,
and tensors of at most an eighth of the layer's input (norms' and softmax's sums, on which much
depends and which take little).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALL = 8


class Code(Protocol):
    """A flat tensor in another form."""

    @property
    def bytes(self) -> int:
        """That it takes."""
        ...

    def decode(self) -> Tensor:
        """The flat tensor, or one near it."""
        ...


@dataclass(frozen=True)
class Form:
    """How a flat tensor's memory lies: (outer, heads, inner)."""

    outer: int
    heads: int
    inner: int


class Codec(Protocol):
    """Gives saved tensors their form. place: "<layer>/<number>", the same in every pass."""

    def encode(self, place: str, flat: Tensor, form: Form) -> Code | None:
        """flat: (n,). None: keep it as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Kept:
    """A saved tensor: its code, and the view of it that was saved."""

    code: Code
    size: torch.Size
    stride: tuple[int, ...]

    def restore(self) -> Tensor:
        """A tensor of the old size and strides."""
        return self.code.decode().as_strided(self.size, self.stride)


class SavedAs(torch.autograd.graph.saved_tensors_hooks):
    """Within it, what layer `name` saves goes through the codec.

    heads: of attention; given: the layer's input; outside: other tensors that it does not make.
    """

    def __init__(
        self, codec: Codec, name: str, heads: int, given: Tensor, outside: Iterable[Tensor]
    ) -> None:
        self.codec, self.name, self.heads = codec, name, heads
        self.least = given.numel() // SMALL
        self.outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Code | None]] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Kept:
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if not tensor.is_floating_point() or tensor.numel() <= self.least:
            return tensor
        if storage.data_ptr() in self.outside:
            return tensor
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
        dense = tensor.permute(order)
        if not dense.is_contiguous():
            tensor, order = tensor.contiguous(), list(range(tensor.dim()))
            dense, storage = tensor, tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        key = (reference.cdata, tensor.storage_offset(), tensor.numel(), tensor._version)
        if key not in self._known or self._known[key][0].expired():  # type: ignore[no-untyped-call]
            place = f"{self.name}/{len(self._known)}"
            code = self.codec.encode(place, dense.reshape(-1), _form(tensor, order, self.heads))
            self._known[key] = (reference, code)
        found = self._known[key][1]
        return tensor if found is None else Kept(found, tensor.shape, tensor.stride())

    @staticmethod
    def _unpack(kept: Tensor | Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.restore()


def _form(tensor: Tensor, order: list[int], heads: int) -> Form:
    """(batch, heads, tokens, width) has its heads' axis, wherever it lies; rows of any width are
    cut into as many parts as there are heads, where that is possible."""
    sizes = [tensor.shape[axis] for axis in order]
    if tensor.dim() == 4:
        place = order.index(1)
        outer = torch.Size(sizes[:place]).numel()
        return Form(outer, sizes[place], torch.Size(sizes[place + 1 :]).numel())
    width = sizes[-1]
    parts = heads if width % heads == 0 else 1
    return Form(tensor.numel() // width, parts, width // parts)
