"""What a rotary position embedding is: the numbers that fix its frequencies, no arithmetic.

`models.config` carries a `RopeConfig`; `reference/rope.py` turns it into frequencies and rotates.
Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

RopeKind = Literal["default", "linear", "llama3", "yarn", "factors"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of a half-split rotary embedding.

    kind: "default"; "linear" divides every frequency by `factor`; "llama3" interpolates between
    the two by wavelength; "yarn" ramps by dimension; "factors" divides by one number per
    frequency (how GGUF stores llama3). Values are checked here: ValueError names the bad one.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            known = ", ".join(ROPE_KINDS)
            raise ValueError(f"rope kind {self.kind!r} is not known; accepted are {known}.")
        numbers = [self.theta, self.factor, self.low_freq_factor, self.high_freq_factor]
        numbers += [self.beta_fast, self.beta_slow, *self.factors]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("rope numbers (theta, factors, betas) must be finite and positive.")
        if not self.theta > 1:
            raise ValueError(f"rope theta must be larger than 1, got {self.theta}.")
        if self.attention_factor is not None and not math.isfinite(self.attention_factor):
            raise ValueError("rope attention_factor must be finite.")
        if self.kind in ("llama3", "yarn") and self.original_context_tokens < 1:
            raise ValueError(f"rope kind {self.kind!r} needs original_context_tokens >= 1.")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope high_freq_factor must be larger than low_freq_factor.")
        if self.kind == "factors" and not self.factors:
            raise ValueError("rope kind 'factors' needs one factor per frequency.")
