"""What is asked of a deployment: how many requests of which lengths, and how fast the answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Bucket(NamedTuple):
    """Requests of about so many tokens in and out."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Slo:
    """Limits that `attained` of the requests keep: time to the first token, and between tokens.
    None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    attained: float = 0.9


@dataclass(frozen=True)
class Demand:
    """Requests per second of each bucket, and what they may take."""

    requests_per_s: Mapping[Bucket, float]
    slo: Slo = Slo()

    @property
    def total_per_s(self) -> float:
        return sum(self.requests_per_s.values())
