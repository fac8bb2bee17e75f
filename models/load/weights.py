"""Fills a decoder from a source of named tensors, in place.

A source speaks transformers' names and never allocates; `fill` knows which of them lie one below
the other in our fused matrices. All shapes are compared before the decoder's memory exists.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from models.config import ModelConfig
from models.decoder import Decoder


class WeightSource(Protocol):
    """Named tensors of one checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. ValueError names the file when it is not there."""
        ...

    def read(self, name: str, out: torch.Tensor) -> None:
        """Writes the tensor's values into out (contiguous, same shape, any float dtype)."""
        ...


class Part(NamedTuple):
    """One tensor of the checkpoint and the rows of our parameter that it fills."""

    source: str
    parameter: str
    start: int
    rows: int
    columns: int | None


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every tensor that a checkpoint of this shape must hold, and where it goes."""
    yield Part("model.embed_tokens.weight", "embed.weight", 0, config.vocab, config.hidden)
    yield Part("model.norm.weight", "norm.weight", 0, config.hidden, None)
    if not config.tied_head:
        yield Part("lm_head.weight", "head.weight", 0, config.vocab, config.hidden)
    for layer in range(config.layers):
        for part in _layer_parts(config):
            yield part._replace(
                source=f"model.layers.{layer}.{part.source}",
                parameter=f"layers.{layer}.{part.parameter}",
            )


def _layer_parts(config: ModelConfig) -> Iterator[Part]:
    hidden, ff = config.hidden, config.ff
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    starts = {"q": (0, query), "k": (query, key), "v": (query + key, key)}
    yield Part("input_layernorm.weight", "mixer_norm.weight", 0, hidden, None)
    yield Part("post_attention_layernorm.weight", "feedforward_norm.weight", 0, hidden, None)
    for letter, (start, rows) in starts.items():
        yield Part(f"self_attn.{letter}_proj.weight", "mixer.qkv.weight", start, rows, hidden)
        if config.qkv_bias:
            yield Part(f"self_attn.{letter}_proj.bias", "mixer.qkv.bias", start, rows, None)
    yield Part("self_attn.o_proj.weight", "mixer.out.weight", 0, hidden, query)
    if config.out_bias:
        yield Part("self_attn.o_proj.bias", "mixer.out.bias", 0, hidden, None)
    yield Part("mlp.gate_proj.weight", "feedforward.gate_up.weight", 0, ff, hidden)
    yield Part("mlp.up_proj.weight", "feedforward.gate_up.weight", ff, ff, hidden)
    yield Part("mlp.down_proj.weight", "feedforward.down.weight", 0, hidden, ff)


def checked_parts(config: ModelConfig, source: WeightSource, name: str) -> list[Part]:
    """All parts, each of them in the source and of the right shape. ValueError as in `fill`."""
    wanted = list(parts(config))
    for part in wanted:
        shape = (part.rows,) if part.columns is None else (part.rows, part.columns)
        found = source.shape(part.source)
        if found != shape:
            raise ValueError(f"{name}: {part.source} has shape {found}, {shape} is wanted.")
    return wanted


def fill(config: ModelConfig, source: WeightSource, dtype: torch.dtype, name: str) -> Decoder:
    """A decoder with the source's weights in dtype, not trainable. ValueError names the file
    (`name`) and the tensor when one is missing or has another shape."""
    wanted = checked_parts(config, source, name)
    decoder = Decoder(config).requires_grad_(False).eval()
    parameters = dict(decoder.named_parameters())
    for parameter in parameters.values():
        parameter.data = torch.empty(parameter.shape, dtype=dtype)
    for part in wanted:
        rows = slice(part.start, part.start + part.rows)
        source.read(part.source, parameters[part.parameter][rows])
    return decoder
