"""Loads a model for a GPU: a GGUF file's blocks split into planes, anything else in one dtype.

What a plane holds has the bits of the file: nothing is quantised anew. Shapes that the kernels do
not take are a NotForDeviceError, which says what to set instead.
"""

from collections import defaultdict
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from kernels.reference.gguf_split import SPLIT, from_gguf
from models.config import ModelConfig
from models.device.decoder import DeviceDecoder, LayerWeights
from models.device.matrix import W4, W8, Matrix, Plain, stacked
from models.device.ops import Ops
from models.load.gguf_weights import Blocks
from models.load.refusal import NotForDeviceError
from models.load.weights import Part, WeightSource, parts

LARGEST_HEAD = 256


@runtime_checkable
class BlockSource(WeightSource, Protocol):
    """A source whose tensors are in block formats, as a GGUF file's are."""

    def form(self, name: str) -> str:
        """The block format that a tensor is stored in."""
        ...

    def blocks(self, name: str) -> Blocks:
        """The tensor as it is stored."""
        ...


def load_on_device(
    config: ModelConfig,
    source: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    path: Path,
    ops: Ops | None = None,
) -> DeviceDecoder:
    """The decoder of an open checkpoint, computing in dtype. ValueError when a tensor is missing or
    has another shape, NotForDeviceError when the kernels do not take the model."""
    _refuse_shape(config, path)
    found: dict[str, list[Part]] = defaultdict(list)
    for part in parts(config):
        found[part.parameter].append(part)
    made = _Loader(source, device, dtype, path)
    embed = made.matrix(found["embed.weight"])[0]
    head = embed if config.tied_head else made.matrix(found["head.weight"])[0]
    layers = [_layer(made, found, f"layers.{index}") for index in range(config.layers)]
    return DeviceDecoder(config, embed, layers, made.vector(found["norm.weight"]), head, ops)


def _refuse_shape(config: ModelConfig, path: Path) -> None:
    reasons = []
    if config.head_dim > LARGEST_HEAD:
        reasons.append(f"its heads have {config.head_dim} values, up to {LARGEST_HEAD} are taken")
    if (config.mixer, config.feedforward) != ("attention", "swiglu"):
        reasons.append(
            f"its layers are {config.mixer} and {config.feedforward}, attention and swiglu are "
            "taken"
        )
    if reasons:
        raise NotForDeviceError(
            f"{path} cannot be computed with engine.kernels = 'triton': {'; '.join(reasons)}; "
            "engine.kernels = 'reference' takes it"
        )


def _layer(made: "_Loader", found: dict[str, list[Part]], prefix: str) -> LayerWeights:
    def bias(name: str) -> torch.Tensor | None:
        chosen = found.get(f"{prefix}.{name}.bias")
        return None if chosen is None else made.vector(chosen)

    def matrix(name: str) -> list[Matrix]:
        return made.matrix(found[f"{prefix}.{name}.weight"])

    return LayerWeights(
        matrix("mixer.qkv"),
        bias("mixer.qkv"),
        matrix("mixer.out")[0],
        bias("mixer.out"),
        matrix("feedforward.gate_up"),
        matrix("feedforward.down")[0],
        made.vector(found[f"{prefix}.mixer_norm.weight"]),
        made.vector(found[f"{prefix}.feedforward_norm.weight"]),
    )


class _Loader:
    """Reads tensors of one checkpoint onto one device."""

    def __init__(
        self, source: WeightSource, device: torch.device, dtype: torch.dtype, path: Path
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.path = path

    def vector(self, pieces: list[Part]) -> torch.Tensor:
        """All pieces, one behind the other."""
        return torch.cat([self._read(piece) for piece in pieces]).to(self.device)

    def matrix(self, pieces: list[Part]) -> list[Matrix]:
        """All pieces, one below the other; more than one where they are of unlike kinds."""
        return stacked([self._matrix(piece) for piece in pieces])

    def _matrix(self, piece: Part) -> Matrix:
        self._compare(piece)
        source = self.source
        if not isinstance(source, BlockSource) or source.form(piece.source) not in SPLIT:
            return Plain(self._read(piece).to(self.device))
        stored = source.blocks(piece.source)
        data = stored.data.flatten().to(self.device)
        split = from_gguf(data, stored.form, stored.rows, stored.columns)
        if split.qweight.dtype == torch.uint8:
            return W4(*split)
        return W8(split.qweight, split.scales)

    def _read(self, piece: Part) -> torch.Tensor:
        out = torch.empty(self._compare(piece), dtype=self.dtype)
        self.source.read(piece.source, out)
        return out

    def _compare(self, piece: Part) -> tuple[int, ...]:
        wanted = (piece.rows,) if piece.columns is None else (piece.rows, piece.columns)
        found = self.source.shape(piece.source)
        if found != wanted:
            raise ValueError(f"{self.path}: {piece.source} has shape {found}, {wanted} is wanted.")
        return wanted
