"""Token mixers: the part of a layer in which positions see each other.

To add one: a file here with a class that satisfies `Mixer`, and a line in MIXERS.
"""

from typing import Any, NamedTuple, Protocol

import torch

from kernels.reference.attention import AttentionPlan
from kernels.reference.rope import Rotation
from models.config import ModelConfig
from models.registry import lookup


class Step(NamedTuple):
    """What all layers of one step share: rotation of its positions, slots it writes, its reads."""

    rotation: Rotation
    slots: torch.Tensor
    plan: AttentionPlan


class Mixer(Protocol):
    """Built from (config, layer index) as an nn.Module."""

    def __call__(self, x: torch.Tensor, step: Step, kv_layer: torch.Tensor) -> torch.Tensor:
        """x [rows, hidden], normalised -> the same shape, to be added to the residual stream.
        kv_layer [2, pages, page_tokens, kv_heads, head_dim] is this layer's memory."""
        ...


MIXERS = {"attention": "models.mixers.attention:Attention"}


def build_mixer(config: ModelConfig, layer: int) -> Any:
    """The mixer of one layer. ValueError when config.mixer is not in MIXERS."""
    return lookup("mixer", MIXERS, config.mixer)(config, layer)
