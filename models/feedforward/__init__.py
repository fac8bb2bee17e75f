"""Feed-forwards: the part of a layer that treats every token alone.

To add one: a file here with a class that satisfies `FeedForward`, and a line in FEEDFORWARDS.
"""

from typing import Any, Protocol

import torch

from models.config import ModelConfig
from models.registry import lookup


class FeedForward(Protocol):
    """Built from (config, layer index) as an nn.Module."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], normalised -> the same shape, to be added to the residual stream."""
        ...


FEEDFORWARDS = {"swiglu": "models.feedforward.swiglu:SwiGLU"}


def build_feedforward(config: ModelConfig, layer: int) -> Any:
    """The feed-forward of one layer. ValueError when config.feedforward is not known."""
    return lookup("feedforward", FEEDFORWARDS, config.feedforward)(config, layer)
