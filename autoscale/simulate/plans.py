"""Which parallel configuration a number of accelerators is best used in, from measured layer times.

Miao et al., "SpotServe: Serving Generative LLMs on Preemptible Instances", ASPLOS 24, section 4: of
the configurations that keep up with the arrivals the one of least latency, else the one of most
throughput.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Config(NamedTuple):
    """`copies` pipelines of `pipeline` stages of `tensor` accelerators each, batches of `batch` cut
    into `cut_first` parts for the prompt and `cut_next` for each further token."""

    copies: int
    tensor: int
    pipeline: int
    batch: int
    cut_first: int
    cut_next: int

    @property
    def accelerators(self) -> int:
        """Of one copy."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class LayerTimes:
    """Measured milliseconds of one layer, by accelerators that share it and batch. fewest:
    accelerators that hold the weights. weight_bytes: of the whole model."""

    layers: int
    padded_layers: int
    factor: float
    first_hop_ms: float
    next_hop_ms: float
    embed_ms: tuple[float, ...]  # batches 1, 2, 4, 8
    first_ms: dict[tuple[int, int], float]
    next_ms: dict[tuple[int, int], float]
    most_tensor: int
    fewest: int
    weight_bytes: float

    def first_s(self, c: Config, batch: int) -> float:
        """Seconds until the prompts of a batch are computed."""
        cut = min(c.cut_first, batch)
        layers = -(-self.layers // c.pipeline)
        ms = self.first_ms[c.tensor, batch // cut] * layers * (c.pipeline + cut - 1) / cut
        return (ms + self.first_hop_ms / cut * (c.pipeline - 1)) * self.factor / 1000

    def next_s(self, c: Config, batch: int) -> float:
        """Seconds for each token after."""
        cut = min(c.cut_next, batch)
        layers = -(-self.layers // c.pipeline)
        ms = self.next_ms[c.tensor, batch // cut] * layers * (c.pipeline + cut - 1)
        return (ms + self.next_hop_ms / cut * (c.pipeline - 1)) * self.factor / 1000

    def latency_s(self, c: Config, batch: int, tokens: int) -> float:
        """Seconds of a whole batch, `tokens` for each of its requests."""
        embed = 2 * self.embed_ms[batch.bit_length() - 1] * self.factor / 1000
        return self.first_s(c, batch) + tokens * self.next_s(c, batch) + embed


def read_layer_times(path: Path, fewest: int, weight_bytes: float) -> LayerTimes:
    """A profile of SpotServe's artifact. FileNotFoundError when it is not there."""
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    first, later = {}, {}
    for name, batches in raw.items():
        if name.startswith("tp-"):
            for batch, times in batches.items():
                key = int(name[3:]), int(batch[4:])
                first[key], later[key] = times["init"], times["incr"]
    return LayerTimes(
        raw["layer_num"],
        raw["padded_layer_num"],
        raw["final_fix_factor"],
        raw["pp_init_comm"],
        raw["pp_incr_comm"],
        tuple(raw["embed"]),
        first,
        later,
        raw["max_tp"],
        fewest,
        weight_bytes,
    )


def best_config(
    times: LayerTimes, accelerators: int, requests_per_s: float, tokens: int, most_batch: int = 4
) -> Config | None:
    """The configuration, None when the weights do not fit."""
    fast: tuple[float, Config] | None = None
    strong: tuple[float, Config] | None = None
    for config in _configs(times, accelerators, most_batch):
        latency_s = times.latency_s(config, config.batch, tokens)
        rate = config.copies * config.batch / latency_s
        if rate >= requests_per_s and (fast is None or latency_s < fast[0]):
            fast = latency_s, config
        if strong is None or rate > strong[0]:
            strong = rate, config
    found = fast or strong
    return found[1] if found else None


def _configs(times: LayerTimes, accelerators: int, most_batch: int) -> list[Config]:
    if accelerators < times.fewest:
        return []
    tensors = [2**power for power in range(8) if 2**power <= min(times.most_tensor, accelerators)]
    batches = [2**power for power in range(4) if 2**power <= most_batch]
    return [
        Config(accelerators // (tensor * pipeline), tensor, pipeline, batch, first, later)
        for tensor in tensors
        for batch in batches
        for first in batches
        for later in batches
        if first <= batch and later <= batch
        for pipeline in range(-(-times.fewest // tensor), accelerators // tensor + 1)
        if times.padded_layers % pipeline == 0
    ]
