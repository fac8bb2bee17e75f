"""The Llama decoder that is trained: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Plain torch with autograd. Parameters are named as Hugging Face's LlamaForCausalLM names them, so
that what is trained is what `models/load/folder.py` reads. Whole packed sequences only: no cache,
no padding, no attention mask but the causal one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.reference.rope import inverse_frequencies
from models.config import ModelConfig
from train.fused import attention, project, rms_norm, rotate, swiglu

INITIAL_STD = 0.02
"""Standard deviation of fresh matrices; those that write to the residual stream have it divided
by sqrt(2 x layers) (GPT-2)."""


class Norm(nn.Module):
    """RMSNorm over the last dimension (Zhang and Sennrich 2019), in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) in, the same out."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; keys and values may have fewer heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.head_dim
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden, bias=config.out_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, tokens, hidden); cos, sin: (tokens, head_dim / 2)."""
        batch, tokens, _ = x.shape
        sizes = [self.heads + self.kv_heads, self.kv_heads]
        parts = (self.q_proj, self.k_proj, self.v_proj)
        joined = side_by_side(x, parts).view(batch, tokens, sum(sizes), self.width)
        turned, value = torch.split(joined, sizes, 2)
        both = rotate(turned, cos, sin)
        query, key = torch.split(both, [self.heads, self.kv_heads], 2)
        mixed = attention(query, key, value)
        out: Tensor = self.o_proj(mixed.reshape(batch, tokens, -1))
        return out


def side_by_side(x: Tensor, parts: Sequence[nn.Module]) -> Tensor:
    """What several linear modules make of x, one after the other in the last dimension. In one
    product, unless one of them has been replaced by something else that is linear."""
    plain = [part for part in parts if type(part) is nn.Linear]
    if len(plain) < len(parts):
        return torch.cat([part(x) for part in parts], -1)
    out = project(x, *(part.weight for part in plain))
    if getattr(plain[0], "bias", None) is None:
        return out
    return out + torch.cat([part.bias for part in plain])


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ff, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ff, bias=False)
        self.down_proj = nn.Linear(config.ff, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) in, the same out."""
        joined = side_by_side(x, (self.gate_proj, self.up_proj))
        out: Tensor = self.down_proj(swiglu(joined))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind its norm, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden, config.rms_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, hidden) in, the same out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and the last norm: what Hugging Face keeps under `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm = Norm(config.hidden, config.rms_eps)


class Llama(nn.Module):
    """A causal language model of the shape of `config`; weights are undefined until set."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.tie()
        # Not a buffer: it stays float32 whatever the dtype of the weights.
        with torch.device("cpu"):
            self.frequencies = inverse_frequencies(config.rope, config.head_dim)

    def tie(self) -> None:
        """Makes the embedding the output matrix, too, if it is to be. Again after the parameters
        were replaced, as `to_empty` does."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, tokens) of ids; logits (batch, tokens, vocab) in the weights' dtype."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self.angles(tokens.shape[1], x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits

    def angles(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to tokens - 1, each (tokens, head_dim / 2)."""
        inverse, scale = self.frequencies
        angles = torch.outer(torch.arange(tokens, dtype=torch.float32), inverse)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """Summed cross-entropy in nats of each token after the first of its sequence, given those
        before it. tokens: (batch, tokens + 1); in float32, or float64 for float64 weights."""
        logits = self(tokens[:, :-1])
        wide = logits.float() if logits.dtype != torch.float64 else logits
        return functional.cross_entropy(
            wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
