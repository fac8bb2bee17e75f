"""Makes a decoder in whole numbers of one in floats: ranges first, then points and weights.

`observe` runs the float decoder over some text and notes how large each kind of value becomes;
`build` gives every kind the finest point at which 8 times that still fits (twice, for the 15 bits
of attention), and every row of a matrix the scale of its largest weight. Floats end here. Called
by `serve/perplexity.py`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kernels.reference import integer
from kernels.reference.rope import inverse_frequencies
from models.batch import TokenBatch
from models.config import ModelConfig
from models.decoder import Decoder
from models.decoder import Norm as FloatNorm
from models.integer import IntegerDecoder, Layer, Matrix, Norm, Rotation, Shifts

# Largest magnitude that was seen of every kind of value, by its name.
Ranges = dict[str, float]

HEADROOM_BITS, PAIR_HEADROOM_BITS = 3, 1
FINEST_POINT = 24
MULTIPLIER_BITS = 24
NORM_WEIGHT_BITS = 24


def observe(decoder: Decoder, texts: Iterable[Sequence[int]]) -> Ranges:
    """Runs each text by itself and returns the ranges. The decoder is in float32."""
    ranges: Ranges = {}
    handles = [
        module.register_forward_hook(_noting(ranges, name, decoder.config))
        for name, module in decoder.named_modules()
        if isinstance(module, FloatNorm | nn.Linear)
    ]
    try:
        for text in texts:
            with torch.inference_mode():
                logits = decoder(*_alone(decoder.config, text))
            _note(ranges, "logits", logits)
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def build(decoder: Decoder, ranges: Ranges) -> IntegerDecoder:
    """The decoder in integers. ValueError when this machine's int8 product is not exact, or the
    model is none that integers are made of here."""
    if not integer.products_are_exact():
        raise ValueError(
            "this machine's torch._int_mm saturates, so models are not computed in integers on it; "
            "a CPU with VNNI or AMX is accepted."
        )
    config = decoder.config
    if (config.mixer, config.feedforward) != ("attention", "swiglu"):
        raise ValueError(
            f"{config.name} has {config.mixer} and {config.feedforward} layers; attention and "
            "swiglu are what is computed in integers."
        )
    points = _Points(ranges)
    residual = points.of(*(name for name in ranges if name.endswith("norm.in")))
    last = points.of("norm.out")
    logits = points.of("logits")
    embed, head = decoder.embed, decoder.head or decoder.embed
    return IntegerDecoder(
        config,
        _matrix(embed, 0, residual, least_shift=0),
        tuple(_layer(decoder, index, points, residual) for index in range(config.layers)),
        _norm(decoder.norm, residual, last),
        _matrix(head, last, logits),
        _tables(config),
        logits,
    )


class _Points:
    """Where the binary point of each kind of value lies."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges

    def of(self, *names: str) -> int:
        """Of int32, for values named so."""
        return self._fitting(31 - HEADROOM_BITS, names)

    def of_pair(self, *names: str) -> int:
        """Of integers of 15 bits."""
        return self._fitting(integer.PAIR_BITS - 1 - PAIR_HEADROOM_BITS, names)

    def _fitting(self, bits: int, names: tuple[str, ...]) -> int:
        largest = max(self.ranges[name] for name in names)
        if not 0 < largest < math.inf:
            raise ValueError(f"{names[0]} is {largest} on this text; finite, non-zero is accepted.")
        return min(FINEST_POINT, bits - math.ceil(math.log2(largest)))


def _layer(decoder: Decoder, index: int, points: _Points, residual: int) -> Layer:
    layer: Any = decoder.layers[index]
    config, name = decoder.config, f"layers.{index}"
    mixer, feedforward = f"{name}.mixer", f"{name}.feedforward"
    normed, fed = points.of(f"{name}.mixer_norm.out"), points.of(f"{feedforward}_norm.out")
    qkv, gate = points.of(f"{mixer}.qkv.out"), points.of(f"{feedforward}.gate_up.out")
    value = points.of_pair(f"{mixer}.qkv.v")
    product = min(points.of(f"{feedforward}.down.in"), 2 * gate)
    if gate < integer.EXP_POINT:
        raise ValueError(
            f"{feedforward}: gates of {points.ranges[f'{feedforward}.gate_up.out']:.3g} do not fit "
            f"32 bits; below 2^{28 - integer.EXP_POINT} is accepted."
        )
    return Layer(
        config.heads,
        config.kv_heads,
        _norm(layer.mixer_norm, residual, normed),
        _matrix(layer.mixer.qkv, normed, qkv),
        _matrix(layer.mixer.out, value + integer.MIXED_POINT, residual),
        _norm(layer.feedforward_norm, residual, fed),
        _matrix(layer.feedforward.gate_up, fed, gate),
        _matrix(layer.feedforward.down, product, residual),
        _shifts(config, mixer, points, qkv, gate, product),
    )


def _shifts(
    config: ModelConfig, mixer: str, points: _Points, qkv: int, gate: int, product: int
) -> Shifts:
    # Rotated: a pair keeps its length, so either may become sqrt(2) times the larger.
    query, key = (points.of_pair(f"{mixer}.qkv.{part}") for part in "qk")
    value = points.of_pair(f"{mixer}.qkv.v")
    scale = 2.0 ** (integer.EXP_POINT - query - key) / math.sqrt(config.head_dim)
    multiplier, shift = _dyadic(torch.tensor([scale], dtype=torch.float64))
    return Shifts(
        integer.TABLE_POINT + qkv - query,
        integer.TABLE_POINT + qkv - key,
        qkv - value,
        int(multiplier),
        _shift(shift, 0),
        gate,
        2 * gate - product,
    )


def _norm(norm: Any, point: int, made: int) -> Norm:
    """Of a residual stream at `point`; the result is at `made`."""
    size = norm.weight.shape[0]
    weight = norm.weight.double() * math.sqrt(size)
    multiplier, shift = _dyadic(weight)
    epsilon = round(size * norm.eps * 4.0**point)
    return Norm(multiplier, max(1, epsilon), _shift(integer.ONE_POINT + shift - made, 0))


def _matrix(
    matrix: nn.Linear | nn.Embedding,
    point: int,
    made: int,
    least_shift: int = integer.LEAST_LINEAR_SHIFT,
) -> Matrix:
    """For x at `point` and a result at `made`."""
    weight = matrix.weight.double()
    scales = weight.abs().amax(1, keepdim=True) / 127
    rows = (weight / scales.clamp(min=1e-30)).round().to(torch.int8)
    multiplier, shift = _dyadic(scales.squeeze(1) * 2.0 ** (made - point))
    bias = getattr(matrix, "bias", None)
    if bias is not None:
        bias = integer.narrow((bias.double() * 2.0**made).round().long())
    return Matrix(rows, multiplier, _shift(shift, least_shift), bias)


def _dyadic(scales: torch.Tensor) -> tuple[torch.Tensor, int]:
    """multiplier int32 of up to 24 bits and one shift, so that multiplier / 2^shift is scales."""
    largest = float(scales.abs().max())
    shift = MULTIPLIER_BITS - math.frexp(largest)[1]
    return (scales * 2.0**shift).round().int(), shift


def _shift(shift: int, least: int) -> int:
    if not least <= shift <= 62:
        raise ValueError(
            f"a scale of this model would be a shift by {shift}; {least}..62 are accepted, so its "
            "values are too large or too small for 32 bits."
        )
    return shift


def _tables(config: ModelConfig) -> Rotation:
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    places = torch.arange(config.context_tokens, dtype=torch.float64)
    angles = places[:, None, None] * frequencies.inverse.double()
    scale = frequencies.scale * (1 << integer.TABLE_POINT)
    return Rotation((angles.cos() * scale).round().int(), (angles.sin() * scale).round().int())


def _note(ranges: Ranges, name: str, values: torch.Tensor) -> None:
    ranges[name] = max(ranges.get(name, 0.0), float(values.abs().max()))


def _noting(
    ranges: Ranges, name: str, config: ModelConfig
) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    sections = [config.heads, config.kv_heads, config.kv_heads]

    def hook(module: nn.Module, args: Any, made: torch.Tensor) -> None:
        _note(ranges, f"{name}.in", args[0])
        _note(ranges, f"{name}.out", made)
        if name.endswith("mixer.qkv"):
            heads = made.view(-1, sum(sections), config.head_dim)
            for part, rows in zip("qkv", torch.split(heads, sections, -2), strict=True):
                _note(ranges, f"{name}.{part}", rows)

    return hook


def _alone(config: ModelConfig, text: Sequence[int]) -> tuple[TokenBatch, torch.Tensor]:
    """One sequence in one page, all of whose logits are wanted, and its cache."""
    tokens = len(text)
    places = torch.arange(tokens)
    batch = TokenBatch(
        torch.tensor(text),
        places,
        places,
        (0, tokens),
        (tokens,),
        torch.zeros(1, 1, dtype=torch.int64),
        places,
    )
    return batch, torch.zeros(config.layers, 2, 1, tokens, config.kv_heads, config.head_dim)
