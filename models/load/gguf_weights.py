"""GGUF as a source of weights: decodes blocks straight into the decoder's memory.

Query and key rows of the "llama" architecture are stored as rotary pairs (2i, 2i + 1); ours, like
transformers', are half-split (i, i + d/2), so whole rows are put back in order here.
"""

from typing import NamedTuple

import torch

from kernels.reference.dequantize import dequantize
from models.config import ModelConfig
from models.load.gguf import architecture, stored_name
from models.load.gguf_file import GGUFFile


class Blocks(NamedTuple):
    """A stored tensor: data [rows, bytes] uint8 in block format `form`, `columns` values a row."""

    data: torch.Tensor
    form: str
    rows: int
    columns: int


class GGUFWeights:
    """See `WeightSource`."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file = file
        self.interleaved_heads: dict[str, int] = {}
        if architecture(file).interleaved:
            self.interleaved_heads = {"q_proj": config.heads, "k_proj": config.kv_heads}

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape. ValueError when the tensor is missing."""
        stored = self.file.tensors.get(stored_name(name))
        if stored is None:
            raise ValueError(f"{self.file.path}: tensor {stored_name(name)!r} is missing.")
        return stored.shape

    def form(self, name: str) -> str:
        """The block format that a tensor is stored in."""
        return self.file.tensors[stored_name(name)].format.name

    def read(self, name: str, out: torch.Tensor) -> None:
        """Decodes the tensor into out, rows in half-split order."""
        stored = self.blocks(name)
        dequantize(stored.data.flatten(), stored.form, out)

    def blocks(self, name: str) -> Blocks:
        """The tensor as it is stored, rows in half-split order. A vector has rows of one value."""
        stored = stored_name(name)
        tensor = self.file.tensors[stored]
        rows, columns = (*tensor.shape, 1)[:2]
        data = torch.frombuffer(self.file.stored_bytes(stored), dtype=torch.uint8).view(rows, -1)
        heads = self.interleaved_heads.get(name.split(".")[-2])
        if heads is not None:
            # Reordering stored rows is cheaper than reordering decoded ones.
            order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
            data = data.index_select(0, order)
        return Blocks(data, tensor.format.name, rows, columns)
