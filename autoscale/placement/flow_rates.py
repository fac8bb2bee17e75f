"""How many tokens per second a node passes that holds l layers, from measured times of one
layer."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one layer for a decode batch of so many tokens, ascending. source: printed
    with every plan that rests on it."""

    batch_tokens: tuple[float, ...]
    ms: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.batch_tokens) != len(self.ms) or len(self.ms) < 2:
            raise ValueError(f"{self.source}: as many times as batches are needed, two at least")
        if any(b <= a for a, b in zip(self.batch_tokens, self.batch_tokens[1:], strict=False)):
            raise ValueError(f"{self.source}: batch_tokens have to rise")

    def of(self, batch_tokens: float) -> float:
        """Milliseconds, linear between measured batches; never below the smallest measured one."""
        return float(np.interp(batch_tokens, self.batch_tokens, self.ms))


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer's weights and of one token's keys and values in it, tokens that a request
    keeps on average, and the share of a node's memory that both may fill."""

    weight_bytes: float
    kv_bytes_per_token: float
    context_tokens: float
    usable: float = 0.9

    def requests(self, memory_bytes: float, held: int) -> int:
        """Requests whose keys and values fit beside the weights of `held` layers."""
        left = self.usable * memory_bytes - held * self.weight_bytes
        return max(0, int(left / (held * self.kv_bytes_per_token * self.context_tokens)))


def span_rates(
    times: LayerTimes, memory: LayerMemory, memory_bytes: float, layers: int
) -> tuple[float, ...]:
    """Tokens per second with 1, 2, … layers held, as many as fit.

    With equal layers a node that holds l of L has l / L of its requests in hand at any moment
    (Little's law, as Helix estimates its typical batch), at most the largest measured batch; a pass
    over that batch takes l times one layer's time.
    """
    largest = times.batch_tokens[-1]
    rates = []
    for held in range(1, layers + 1):
        batch = min(memory.requests(memory_bytes, held) * held / layers, largest)
        if batch <= 0:
            break
        rates.append(batch / (held * times.of(batch) / 1000.0))
    return tuple(rates)
