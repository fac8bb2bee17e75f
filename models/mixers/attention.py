"""Grouped-query attention over the paged cache.

Query, key and value projections are one matrix, rows in that order, so that a step makes one
matrix product where a checkpoint has three; results per row are the same.
"""

import torch
from torch import nn

from kernels.reference.attention import kv_write, paged_attention
from kernels.reference.rope import rotate
from models.config import ModelConfig
from models.linear import Linear
from models.mixers import Step


class Attention(nn.Module):
    """Rotary, causal, grouped-query attention. Holds no state between steps."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.hidden, rows, bias=config.qkv_bias)
        self.out = Linear(self.heads * self.head_dim, config.hidden, bias=config.out_bias)

    def forward(self, x: torch.Tensor, step: Step, kv_layer: torch.Tensor) -> torch.Tensor:
        """See `Mixer`."""
        tokens = x.shape[0]
        heads = self.qkv(x).view(tokens, -1, self.head_dim)
        rotated = rotate(heads[:, : self.heads + self.kv_heads], step.rotation)
        queries, keys = rotated[:, : self.heads], rotated[:, self.heads :]
        values = heads[:, self.heads + self.kv_heads :]
        kv_write(kv_layer, step.slots, keys, values)
        mixed = torch.empty_like(queries)
        paged_attention(queries, kv_layer, step.plan, mixed)
        projected: torch.Tensor = self.out(mixed.view(tokens, -1))
        return projected
