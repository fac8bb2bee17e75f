"""A piece of a checkpoint: a stretch of one tensor, flattened, with the tensor's name and shape.

Pieces are all that writers and readers know of layouts: data parallel workers each give a share of
every tensor, ZeRO ranks what they own, pipeline stages their layers. Whoever loads asks for the
stretches that it needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What a checkpoint can hold: torch's names, and safetensors' codes for them."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements [start, stop) of the flattened tensor `name` of `shape`; data: flat, stop - start
    elements of `dtype` ("float32"), on any device. A tensor without elements is one empty piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    data: Tensor

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(
                f"tensor {self.name!r} is {self.dtype}; a checkpoint holds {', '.join(CODES)}"
            )
        assert 0 <= self.start <= self.stop <= prod(self.shape), self
        assert self.data.shape == (self.stop - self.start,), self
        assert dtype_name(self.data.dtype) == self.dtype, self

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.data.numel() * self.data.element_size()


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """ "float32" -> torch.float32, for the dtypes that a checkpoint can hold."""
    dtype = getattr(torch, name) if name in CODES else None
    assert isinstance(dtype, torch.dtype), name
    return dtype


def stretch(name: str, tensor: Tensor, start: int, stop: int) -> Piece:
    """Elements [start, stop) of a contiguous tensor, sharing its memory."""
    flat = tensor.detach().view(-1)
    return Piece(name, tuple(tensor.shape), dtype_name(tensor.dtype), start, stop, flat[start:stop])


def share(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Piece]:
    """What rank `rank` of `size` writes of tensors that every rank holds: its `size`-th of each, so
    that all ranks write equally much and nothing is written twice. Shares the tensors' memory."""
    assert 0 <= rank < size
    pieces = []
    for name, tensor in tensors.items():
        count = tensor.numel()
        start, stop = count * rank // size, count * (rank + 1) // size
        if start < stop or (count == 0 and rank == 0):
            pieces.append(stretch(name, tensor, start, stop))
    return pieces


def as_bytes(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor in host memory, without a copy."""
    assert flat.device.type == "cpu" and flat.is_contiguous()
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")
