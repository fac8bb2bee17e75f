"""The dense gated feed-forward of Llama. Gate and up projections are one matrix, gate first."""

import torch
from torch import nn

from kernels.reference.swiglu import swiglu
from models.config import ModelConfig
from models.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden, 2 * config.ff, bias=False)
        self.down = Linear(config.ff, config.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `FeedForward`."""
        projected: torch.Tensor = self.down(swiglu(self.gate_up(x)))
        return projected
