"""Loads a GGUF file for the CPU kernels: blocks are put in another order, never decoded.

Accepts what `kernels.cpu` packs; anything else is a ValueError that says what to set instead.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
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
    """One packed matrix: the tensors that lie one below the other in it, and what it will be.
    kind: see ops.KINDS."""

    names: Names
    kind: int
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
    names = list(_names(source, config))
    places = [_place(source, group) for group in names]
    matrices = dict(zip(names, _packed(source, places, config, cache_dir), strict=True))
    layers = [_layer(source, matrices, index, config.qkv_bias) for index in range(config.layers)]
    embed = matrices[EMBED]
    norm = _vector(source, "model.norm.weight")
    return PackedDecoder(config, embed, layers, norm, matrices.get(HEAD, embed), activations)


def _names(source: GGUFWeights, config: ModelConfig) -> Iterator[Names]:
    """Every packed matrix of the decoder, by the tensors that it is made of."""
    yield EMBED
    if not config.tied_head:
        yield HEAD
    for index in range(config.layers):
        yield from _qkv_names(source, index)
        yield from _other_names(index)


def _qkv_names(source: GGUFWeights, index: int) -> Iterator[Names]:
    """One group for all parts of a layer's qkv, or more where they are of unlike kinds: files of
    mixed formats keep values finer than queries and keys."""
    prefix = f"model.layers.{index}.self_attn"
    names = (f"{prefix}.{letter}_proj.weight" for letter in "qkv")
    for _, group in groupby(names, key=lambda name: _kind(source, name)):
        yield tuple(group)


def _other_names(index: int) -> tuple[Names, Names, Names]:
    """Of one layer, in the order of ops.LayerWeights."""
    prefix = f"model.layers.{index}"
    return (
        (f"{prefix}.self_attn.o_proj.weight",),
        tuple(f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up")),
        (f"{prefix}.mlp.down_proj.weight",),
    )


def _kind(source: GGUFWeights, name: str) -> int:
    """Of the tensor once it is packed. ValueError when it is missing, or of another format."""
    source.shape(name)
    form = source.form(name)
    if form not in ops.KINDS:
        raise _refused(
            source.file, f"{name} is stored as {form}; {', '.join(ops.KINDS)} are accepted"
        )
    return ops.KINDS[form]


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
    sizes = [ops.packed_bytes(place.kind, place.rows, place.columns) for place in places]
    return [
        ops.Packed(data, place.kind, place.rows, place.columns)
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
    qkv = tuple(matrices[names] for names in _qkv_names(source, index))
    out, gate_up, down = (matrices[names] for names in _other_names(index))
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
    """ValueError when a tensor is missing, or they are not all of one kind."""
    kinds = {_kind(source, name) for name in names}
    if len(kinds) != 1:
        found = " and ".join(source.form(name) for name in names)
        raise _refused(
            source.file,
            f"{' and '.join(names)} are stored as {found}; one format is accepted for both",
        )
    shapes = [source.shape(name) for name in names]
    return Place(names, kinds.pop(), sum(shape[0] for shape in shapes), shapes[0][1])


def _pack(source: GGUFWeights, place: Place) -> ops.Packed:
    """Parts are whole tiles (MULTIPLE sees to that), so they are packed one by one, each from its
    own format."""
    parts = [
        ops.pack(stored.data.flatten(), stored.form, stored.rows, stored.columns).data
        for stored in map(source.blocks, place.names)
    ]
    data = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ops.Packed(data, place.kind, place.rows, place.columns)


def _vector(source: GGUFWeights, name: str) -> torch.Tensor:
    made = torch.empty(source.shape(name), dtype=torch.float32)
    source.read(name, made)
    return made
