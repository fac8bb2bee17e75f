"""The decoder: embedding, layers of mixer and feed-forward, final norm, head.

The frame of every Llama-family model; what a layer does is chosen by name from the registries in
`mixers/` and `feedforward/`. Stateless between steps: all memory is the cache handed in. Built
and filled by `models.load`, run by `serve/engine`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.reference.attention import plan_attention
from kernels.reference.norm import rms_norm
from kernels.reference.rope import inverse_frequencies, rotation
from models.batch import TokenBatch
from models.config import ModelConfig
from models.feedforward import build_feedforward
from models.linear import Embedding, Linear
from models.mixers import Step, build_mixer


class Norm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """One pre-norm residual layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = Norm(config.hidden, config.rms_eps)
        self.mixer = build_mixer(config, index)
        self.feedforward_norm = Norm(config.hidden, config.rms_eps)
        self.feedforward = build_feedforward(config, index)

    def forward(self, x: torch.Tensor, step: Step, kv_layer: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> the same shape."""
        mixed: torch.Tensor = self.mixer(self.mixer_norm(x), step, kv_layer)
        x = x + mixed
        fed: torch.Tensor = self.feedforward(self.feedforward_norm(x))
        return x + fed


class Decoder(nn.Module):
    """A decoder of `config`'s shape. Its matrices are unset until a loader fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = Norm(config.hidden, config.rms_eps)
        self.head = None if config.tied_head else Linear(config.hidden, config.vocab, bias=False)
        # Not a buffer: it stays float32 whatever the dtype of the weights.
        self.frequencies = inverse_frequencies(config.rope, config.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the cache that `forward` expects."""
        return self.embed.weight.dtype

    def forward(self, batch: TokenBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] float32 of batch.logit_rows; writes the batch's keys and values.

        kv [layers, 2, pages, page_tokens, kv_heads, head_dim] in the weights' dtype (asserted);
        everything that earlier positions wrote is read through batch.page_tables. kv must be
        finite everywhere (zeros before first use). In float32 a row's logits do not depend, in
        any bit, on the other rows or on how its sequence was cut into steps.
        """
        return self.logits(self.states(batch, kv))

    def states(self, batch: TokenBatch, kv: torch.Tensor) -> torch.Tensor:
        """[R, hidden]: what the head reads at batch.logit_rows; see `forward` for the rest."""
        config = self.config
        assert kv.dtype == self.dtype, "the cache must have the dtype of the weights"
        assert kv.shape[0] == config.layers and kv.shape[4:] == (config.kv_heads, config.head_dim)
        step = Step(
            rotation(self.frequencies, batch.positions, self.dtype),
            batch.slots,
            plan_attention(
                batch.query_starts,
                batch.context_tokens,
                batch.page_tables,
                kv.shape[3],
                self.dtype,
            ),
        )
        x = self.embed(batch.ids)
        for layer, kv_layer in zip(self.layers, kv.unbind(0), strict=True):
            x = layer(x, step, kv_layer)
        states: torch.Tensor = self.norm(x.index_select(0, batch.logit_rows))
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32 of states [R, hidden]."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(states, weight).float()
