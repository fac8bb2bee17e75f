"""Rotary position embeddings (Su et al., 2021) in the half-split layout of transformers.

`inverse_frequencies` is computed once per model, `rotation` once per step, `rotate` once per
layer. Scalings follow the formulas of transformers' `modeling_rope_utils`, so that a checkpoint
behaves as it was trained.
"""

import math
from typing import NamedTuple

import torch

from kernels.reference.precision import wide
from kernels.rope import RopeConfig


class Frequencies(NamedTuple):
    """inverse [head_dim / 2] float32, and the factor that cosines and sines are scaled by."""

    inverse: torch.Tensor
    scale: float


class Rotation(NamedTuple):
    """Cosines and signed sines [tokens, 1, head_dim] of one step's positions."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Frequencies:
    """Frequencies for heads of head_dim values (even). ValueError for a wrong factor count."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    powers = rope.theta**exponents
    inverse = 1.0 / powers
    if rope.kind == "linear":
        return Frequencies(inverse / rope.factor, 1.0)
    if rope.kind == "llama3":
        return Frequencies(_llama3(rope, inverse), 1.0)
    if rope.kind == "yarn":
        return _yarn(rope, powers, head_dim)
    if rope.kind == "factors":
        if len(rope.factors) != head_dim // 2:
            wanted = head_dim // 2
            raise ValueError(f"rope factors: got {len(rope.factors)}, accepted are {wanted}.")
        return Frequencies(inverse / torch.tensor(rope.factors), 1.0)
    return Frequencies(inverse, 1.0)


def _llama3(rope: RopeConfig, inverse: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between are blended."""
    longest = rope.original_context_tokens / rope.low_freq_factor
    shortest = rope.original_context_tokens / rope.high_freq_factor
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    blend = (rope.original_context_tokens / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * scaled / rope.factor + blend * scaled
    between = ~(wavelength < shortest) & ~(wavelength > longest)
    return torch.where(between, smooth, scaled)


def _yarn(rope: RopeConfig, powers: torch.Tensor, head_dim: int) -> Frequencies:
    """NTK-by-parts: interpolate slow dimensions, keep fast ones (Peng et al., 2023)."""

    def dimension(rotations: float) -> float:
        turns = rope.original_context_tokens / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    inverse = 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return Frequencies(inverse, scale)


def rotation(frequencies: Frequencies, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for positions [tokens] int64, ready for `rotate`, in dtype."""
    angles = positions[:, None].float() * frequencies.inverse
    cos, sin = angles.cos() * frequencies.scale, angles.sin() * frequencies.scale
    full_cos = torch.cat((cos, cos), dim=-1)[:, None, :]
    # The sign of rotate_half lives in the sine, which leaves one roll per layer.
    signed_sin = torch.cat((-sin, sin), dim=-1)[:, None, :]
    return Rotation(full_cos.to(dtype), signed_sin.to(dtype))


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """x [tokens, heads, head_dim] -> the same shape with every head rotated to its position."""
    return (x * by.cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(by.sin))


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k [T, KH, D], cos and sin [T, D / 2] -> both rotated to their positions.

    Value i of a head is paired with value i + D / 2. Computed in float32, rounded once; `rotate`
    is the same for one tensor with tables of full width, in the dtype of the tables.
    """
    return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    exact = wide(x)
    first, second = x.to(exact).chunk(2, dim=-1)
    by_cos, by_sin = cos.to(exact)[:, None], sin.to(exact)[:, None]
    rotated = (first * by_cos - second * by_sin, second * by_cos + first * by_sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)
