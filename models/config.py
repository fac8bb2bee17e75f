"""The shape of a decoder, independent of the file it came from.

Loaders fill it from foreign metadata, so it checks itself; `models.decoder` and the engine read
it. Imports no torch.
"""

import math
from dataclasses import dataclass, field

from kernels.rope import RopeConfig

# Far above any real model and low enough that a hostile file cannot ask for absurd shapes.
LARGEST_DIMENSION = 1 << 24
LARGEST_LAYERS = 4096


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder. All counts are positive; ValueError names the one that is not.

    name: for people; layers: decoder layers; hidden: width of the residual stream; heads and
    kv_heads: query and key/value heads (heads is a multiple of kv_heads); head_dim: values per
    head (even); ff: inner width of the feed-forward; vocab: rows of the embedding;
    context_tokens: longest sequence the model was made for; tied_head: the embedding is also the
    output matrix; qkv_bias, out_bias: biases of the attention projections; eos_token_ids: tokens
    that end an answer; mixer, feedforward: names in the registries of `models/mixers` and
    `models/feedforward`.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    context_tokens: int
    rms_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    mixer: str = "attention"
    feedforward: str = "swiglu"

    def __post_init__(self) -> None:
        for key in ("hidden", "heads", "kv_heads", "head_dim", "ff", "vocab", "context_tokens"):
            value = getattr(self, key)
            if not 1 <= value <= LARGEST_DIMENSION:
                raise ValueError(f"{key} must be in 1..{LARGEST_DIMENSION}, got {value}.")
        if not 1 <= self.layers <= LARGEST_LAYERS:
            raise ValueError(f"layers must be in 1..{LARGEST_LAYERS}, got {self.layers}.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}.")
        if not (math.isfinite(self.rms_eps) and self.rms_eps > 0):
            raise ValueError(f"rms_eps must be finite and positive, got {self.rms_eps}.")

    def kv_token_bytes(self, itemsize_bytes: int) -> int:
        """Bytes that the keys and values of one token take in all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize_bytes
