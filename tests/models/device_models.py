"""Random models for decoders on a device, made without any library but torch: what runs on a
machine with a GPU has little else. One source of blocks serves a decoder and its oracle."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from kernels.formats import FORMATS
from kernels.kv_planes import planes
from kernels.reference.dequantize import dequantize
from models.config import ModelConfig
from models.decoder import Decoder
from models.device.decoder import DeviceDecoder
from models.device.ops import Ops
from models.device.step import Cache
from models.load.device import load_on_device
from models.load.gguf_weights import Blocks
from models.load.weights import fill, parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    name="tiny",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ff=96,
    vocab=80,
    context_tokens=256,
    rms_eps=1e-5,
    tied_head=True,
)
LARGER = replace(CONFIG, hidden=256, heads=8, ff=512)  # whole blocks of 256
# What scales are multiplied by, so that values have a standard deviation of one, roughly.
SPREAD = {"Q4_0": 0.2, "Q4_1": 0.2, "Q8_0": 0.0135, "Q4_K": 1 / 330, "Q6_K": 1 / 1370}


def random_stored(form: str, rows: int, columns: int, seed: int, scale: float) -> torch.Tensor:
    """uint8 [bytes]: random values in a block format, `scale` their standard deviation."""
    chance = torch.Generator().manual_seed(seed)
    block = FORMATS[form]
    count = rows * columns // block.block_values
    if form in ("F32", "F16", "BF16"):
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[form]
        values = torch.randn(rows * columns, generator=chance) * scale
        return values.to(kind).view(torch.uint8)
    stored = torch.randint(0, 256, (count, block.block_bytes), dtype=torch.uint8, generator=chance)
    outer = (torch.rand(count, 1, generator=chance) + 0.5) * scale * SPREAD[form]
    halves = {
        "Q4_0": ((0, outer),),
        "Q4_1": ((0, outer), (2, -7.5 * outer)),
        "Q8_0": ((0, outer),),
        "Q4_K": ((0, outer), (2, 7.5 * outer)),
        "Q6_K": ((208, outer),),
    }[form]
    for place, half in halves:
        stored[:, place : place + 2] = half.half().view(torch.uint8)
    return stored.flatten()


class RandomSource:
    """Named tensors of a random checkpoint. forms: of matrices, by the part of a name that tells
    them apart; every other matrix is `form`."""

    def __init__(
        self, config: ModelConfig, form: str, forms: Mapping[str, str] | None = None
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.forms: dict[str, str] = {}
        self.stored: dict[str, torch.Tensor] = {}
        for seed, part in enumerate(parts(config)):
            shape = (part.rows,) if part.columns is None else (part.rows, part.columns)
            matched = [each for name, each in (forms or {}).items() if name in part.source]
            kept = "F32" if part.columns is None else (matched or [form])[0]
            self.shapes[part.source], self.forms[part.source] = shape, kept
            columns = part.columns or 1
            spread = 0.2 if part.columns is None else columns**-0.5
            raw = random_stored(kept, part.rows, columns, seed, spread)
            if "norm" in part.source:
                raw = (raw.view(torch.float32) + 1).view(torch.uint8)
            self.stored[part.source] = raw

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def form(self, name: str) -> str:
        return self.forms[name]

    def read(self, name: str, out: torch.Tensor) -> None:
        dequantize(self.stored[name], self.forms[name], out)

    def blocks(self, name: str) -> Blocks:
        rows, columns = (*self.shapes[name], 1)[:2]
        return Blocks(self.stored[name].view(rows, -1), self.forms[name], rows, columns)


def on_device(
    source: RandomSource,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device = DEVICE,
    ops: Ops | None = None,
) -> DeviceDecoder:
    return load_on_device(config, source, device, dtype, Path("random"), ops)


def oracle(source: RandomSource, config: ModelConfig) -> Decoder:
    """The float32 decoder over the same values, on the CPU."""
    return fill(config, source, torch.float32, "random")


def cache_of(
    config: ModelConfig,
    pages: int,
    page_tokens: int,
    kv_format: str = "float32",
    device: torch.device = DEVICE,
) -> Cache:
    """Poisoned: what is read without having been written spoils the result visibly."""
    kept = planes(kv_format, config.head_dim)
    head = (config.layers, 2, pages, page_tokens, config.kv_heads)
    poison = 100 if kept.numbers in ("int8", "uint8") else 1e4
    numbers = torch.full(
        (*head, kept.number_count), poison, dtype=getattr(torch, kept.numbers), device=device
    )
    if not kept.scales:
        return Cache(numbers)
    shape = (*head, *kept.scale_shape)
    return Cache(numbers, torch.full(shape, 100.0, device=device).to(getattr(torch, kept.scales)))
