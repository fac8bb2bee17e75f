"""Loads a GGUF file for the CPU kernels: blocks are put in another order, never decoded.

Accepts what `kernels.cpu` packs; anything else is a ValueError that says what to set instead.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.cpu import ops
from models.config import ModelConfig
from models.load.cache import cache_name, mapped, store, trim
from models.load.gguf_file import GGUFFile
from models.load.gguf_weights import GGUFWeights
from models.load.refusal import NotForCpuError
from models.packed import PackedDecoder

MULTIPLE = 32
Names = tuple[str, ...]
EMBED: Names = ("model.embed_tokens.weight",)
HEAD: Names = ("lm_head.weight",)


class Place(NamedTuple):
    """One packed matrix: the tensors that lie one below the other in it, and what it will be."""

    names: tuple[str, ...]
    form: str
    rows: int
    columns: int


def load_packed(
    file: GGUFFile,
    config: ModelConfig,
    activations: ops.Activations,
    cache_dir: Path | None = None,
) -> PackedDecoder:
    """The decoder of an open file. ValueError when its shape or a format is not accepted.

    cache_dir: a folder for packed weights, which replicas on one machine then share, mapped.
    """
    _refuse_shape(file, config)
    source = GGUFWeights(file, config)
    names = list(_names(config))
    places = [_place(source, group) for group in names]
    matrices = dict(zip(names, _packed(source, places, config, cache_dir), strict=True))
    layers = [_layer(source, matrices, index, config.qkv_bias) for index in range(config.layers)]
    embed = matrices[EMBED]
    norm = _vector(source, "model.norm.weight")
    return PackedDecoder(config, embed, layers, norm, matrices.get(HEAD, embed), activations)


def _names(config: ModelConfig) -> Iterator[Names]:
    """Every packed matrix of the decoder, by the tensors that it is made of."""
    yield EMBED
    if not config.tied_head:
        yield HEAD
    for index in range(config.layers):
        yield from _layer_names(index)


def _layer_names(index: int) -> tuple[Names, Names, Names, Names]:
    """Of one layer, in the order of ops.LayerWeights."""
    prefix = f"model.layers.{index}"
    return (
        tuple(f"{prefix}.self_attn.{letter}_proj.weight" for letter in "qkv"),
        (f"{prefix}.self_attn.o_proj.weight",),
        tuple(f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up")),
        (f"{prefix}.mlp.down_proj.weight",),
    )


def _packed(
    source: GGUFWeights, places: list[Place], config: ModelConfig, cache_dir: Path | None
) -> list[ops.Packed]:
    """All matrices, packed here or mapped from where a process before put them."""
    if cache_dir is None:
        return [_pack(source, place) for place in places]
    name = cache_name(source.file.path, config, torch.uint8)
    kept = cache_dir / f"{Path(name).stem}-packed-{ops.LAYOUT_VERSION}.weights"
    if not kept.is_file():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            store(kept, (_pack(source, place).data for place in places))
            trim()
        except OSError as error:
            raise ValueError(f"{cache_dir} cannot hold packed weights: {error}.") from None
    sizes = [ops.packed_bytes(place.form, place.rows, place.columns) for place in places]
    return [
        ops.Packed(data, ops.KINDS[place.form], place.rows, place.columns)
        for data, place in zip(mapped(kept, sizes), places, strict=True)
    ]


def _refuse_shape(file: GGUFFile, config: ModelConfig) -> None:
    sizes = {"hidden": config.hidden, "ff": config.ff, "head_dim": config.head_dim}
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise _refused(file, f"its {name} is {size}, multiples of {MULTIPLE} are accepted")
    if config.out_bias:
        raise _refused(file, "its attention's output has a bias")


def _refused(file: GGUFFile, reason: str) -> NotForCpuError:
    return NotForCpuError(
        f"{file.path} cannot be computed with engine.kernels = 'cpu': {reason}; "
        "engine.kernels = 'reference' takes it."
    )


def _layer(
    source: GGUFWeights, matrices: Mapping[Names, ops.Packed], index: int, bias: bool
) -> ops.LayerWeights:
    qkv, out, gate_up, down = (matrices[names] for names in _layer_names(index))
    prefix = f"model.layers.{index}"
    return ops.LayerWeights(
        qkv,
        out,
        gate_up,
        down,
        _vector(source, f"{prefix}.input_layernorm.weight"),
        _vector(source, f"{prefix}.post_attention_layernorm.weight"),
        _bias(source, f"{prefix}.self_attn") if bias else torch.empty(0),
    )


def _bias(source: GGUFWeights, prefix: str) -> torch.Tensor:
    return torch.cat([_vector(source, f"{prefix}.{letter}_proj.bias") for letter in "qkv"])


def _place(source: GGUFWeights, names: Names) -> Place:
    """ValueError when a tensor is missing, or they are not all of one accepted format."""
    shapes = [source.shape(name) for name in names]
    forms = {source.form(name) for name in names}
    if len(forms) != 1 or not forms <= set(ops.KINDS):
        found = " and ".join(sorted(forms))
        raise _refused(
            source.file,
            f"{names[0]} is stored as {found}; {', '.join(ops.KINDS)} are accepted, "
            "one for all parts of a fused matrix",
        )
    return Place(names, forms.pop(), sum(shape[0] for shape in shapes), shapes[0][1])


def _pack(source: GGUFWeights, place: Place) -> ops.Packed:
    blocks = torch.cat([source.blocks(name).data.flatten() for name in place.names])
    return ops.pack(blocks, place.form, place.rows, place.columns)


def _vector(source: GGUFWeights, name: str) -> torch.Tensor:
    made = torch.empty(source.shape(name), dtype=torch.float32)
    source.read(name, made)
    return made
