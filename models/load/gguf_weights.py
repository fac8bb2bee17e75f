"""GGUF as a source of weights: decodes blocks straight into the decoder's memory.

Query and key rows of the "llama" architecture are stored as rotary pairs (2i, 2i + 1); ours, like
transformers', are half-split (i, i + d/2), so whole rows are put back in order here.
"""

import torch

from kernels.reference.dequantize import dequantize
from models.config import ModelConfig
from models.load.gguf import architecture, stored_name
from models.load.gguf_file import GGUFFile


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

    def read(self, name: str, out: torch.Tensor) -> None:
        """Decodes the tensor into out, rows in half-split order."""
        stored = stored_name(name)
        form = self.file.tensors[stored].format
        blocks = torch.frombuffer(self.file.stored_bytes(stored), dtype=torch.uint8)
        heads = self.interleaved_heads.get(name.split(".")[-2])
        if heads is not None:
            # Reordering stored rows is cheaper than reordering decoded ones.
            order = torch.arange(out.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)
            blocks = blocks.view(out.shape[0], -1).index_select(0, order).view(-1)
        dequantize(blocks, form.name, out)
