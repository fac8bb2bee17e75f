"""Loads a GGUF file for the CPU kernels: blocks are put in another order, never decoded.

Accepts what `kernels.cpu` packs; anything else is a ValueError that says what to set instead.
"""

from collections.abc import Sequence

import torch

from kernels.cpu import ops
from models.config import ModelConfig
from models.load.gguf_file import GGUFFile
from models.load.gguf_weights import GGUFWeights
from models.packed import PackedDecoder

MULTIPLE = 32


def load_packed(file: GGUFFile, config: ModelConfig, activations: ops.Activations) -> PackedDecoder:
    """The decoder of an open file. ValueError when its shape or a format is not accepted."""
    _refuse_shape(file, config)
    source = GGUFWeights(file, config)
    embed = _matrix(source, ["model.embed_tokens.weight"])
    head = embed if config.tied_head else _matrix(source, ["lm_head.weight"])
    layers = [_layer(source, index) for index in range(config.layers)]
    return PackedDecoder(
        config, embed, layers, _vector(source, "model.norm.weight"), head, activations
    )


def _refuse_shape(file: GGUFFile, config: ModelConfig) -> None:
    sizes = {"hidden": config.hidden, "ff": config.ff, "head_dim": config.head_dim}
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise _refused(file, f"its {name} is {size}, multiples of {MULTIPLE} are accepted")
    if config.qkv_bias or config.out_bias:
        raise _refused(file, "its attention has biases")


def _refused(file: GGUFFile, reason: str) -> ValueError:
    return ValueError(
        f"{file.path} cannot be computed with engine.kernels = 'cpu': {reason}; "
        "engine.kernels = 'reference' takes it."
    )


def _layer(source: GGUFWeights, index: int) -> ops.LayerWeights:
    prefix = f"model.layers.{index}"
    heads = [f"{prefix}.self_attn.{letter}_proj.weight" for letter in "qkv"]
    return ops.LayerWeights(
        _matrix(source, heads),
        _matrix(source, [f"{prefix}.self_attn.o_proj.weight"]),
        _matrix(source, [f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up")]),
        _matrix(source, [f"{prefix}.mlp.down_proj.weight"]),
        _vector(source, f"{prefix}.input_layernorm.weight"),
        _vector(source, f"{prefix}.post_attention_layernorm.weight"),
    )


def _matrix(source: GGUFWeights, names: Sequence[str]) -> ops.Packed:
    """Matrices one below the other, as one. ValueError when they are not of one accepted format."""
    parts = [source.blocks(name) for name in names]
    forms = {part.form for part in parts}
    if len(forms) != 1 or not forms <= set(ops.KINDS):
        found = " and ".join(sorted(forms))
        raise _refused(
            source.file,
            f"{names[0]} is stored as {found}; {', '.join(ops.KINDS)} are accepted, "
            "one for all parts of a fused matrix",
        )
    rows = sum(part.rows for part in parts)
    blocks = torch.cat([part.data.flatten() for part in parts])
    return ops.pack(blocks, forms.pop(), rows, parts[0].columns)


def _vector(source: GGUFWeights, name: str) -> torch.Tensor:
    made = torch.empty(source.shape(name), dtype=torch.float32)
    source.read(name, made)
    return made
