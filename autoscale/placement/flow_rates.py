"""How many tokens per second a node passes that holds l layers, from times of one layer."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class LayerLoad:
    """What one layer weighs and what requests bring to it.

    weight_bytes: of its weights; kv_bytes_per_token: of the keys and values of one token in it.
    input_tokens, output_tokens: of a request, on average. usable: the share of a node's memory that
    weights, keys and values may fill.
    """

    weight_bytes: float
    kv_bytes_per_token: float
    input_tokens: float
    output_tokens: float
    usable: float = 0.9

    def requests(self, memory_bytes: float, held: int) -> float:
        """Requests whose keys and values fit beside the weights of `held` layers, each half
        answered on average."""
        left = self.usable * memory_bytes - held * self.weight_bytes
        context = self.input_tokens + self.output_tokens / 2
        return max(0.0, left / (held * self.kv_bytes_per_token * context))


@dataclass(frozen=True)
class LayerPace:
    """Seconds of one layer on a node: of a prompt, and of a decode batch of so many sequences.
    most_batch: beyond which none was measured, or none keeps the SLO."""

    prompt_s: float
    decode_s: Callable[[float], float]
    most_batch: float = inf


def span_rates(
    load: LayerLoad, pace: LayerPace, memory_bytes: float, layers: int
) -> tuple[float, ...]:
    """Output tokens per second with 1, 2, … layers held, as many as fit.

    With equal layers a node that holds l of L has l / L of its requests in hand at any moment
    (Little's law, as Helix estimates its typical batch). A request costs it, in each layer, its
    prompt once and its share of a decode pass for each output token.
    """
    rates = []
    for held in range(1, layers + 1):
        batch = min(load.requests(memory_bytes, held) * held / layers, pace.most_batch)
        if batch < 1:
            break
        request_s = pace.prompt_s + load.output_tokens * pace.decode_s(batch) / batch
        rates.append(load.output_tokens / (held * request_s))
    return tuple(rates)


def largest(batch_s: Callable[[float], float], limit_s: float, most: float = 4096.0) -> float:
    """The largest batch whose time is within a limit, 0.0 if none is; by bisection."""
    if batch_s(most) <= limit_s:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if batch_s(middle) <= limit_s else (low, middle)
    return low if low >= 1 else 0.0
