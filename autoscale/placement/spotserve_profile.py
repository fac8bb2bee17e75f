"""SpotServe's profile and cost model: how long a batch takes at given degrees of parallelism.

Miao et al., "SpotServe" (ASPLOS 2024), section 3.2 and its artifact's tables: milliseconds per
layer by tensor degree and batch, for a prompt and for one more token, with a pipeline's fill and
communication.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerProfile:
    """One model on one kind of accelerator.

    init_ms, incr_ms: of one layer, by (tensor degree, batch), for a prompt and for one token more.
    embed_ms: by batch, once at either end. pp_*_comm_ms: from stage to stage. fix_factor: measured
    total over the sum. layers_padded: the artifact takes only pipelines that divide it.
    """

    layers: int
    layers_padded: int
    max_tensor: int
    init_ms: Mapping[tuple[int, int], float]
    incr_ms: Mapping[tuple[int, int], float]
    embed_ms: Mapping[int, float]
    pp_init_comm_ms: float
    pp_incr_comm_ms: float
    fix_factor: float
    source: str = "table of SpotServe"

    def __post_init__(self) -> None:
        for name, table in (("init_ms", self.init_ms), ("incr_ms", self.incr_ms)):
            for (tensor, batch), each_ms in table.items():
                if not each_ms > 0:
                    raise ValueError(
                        f"{name} at tensor degree {tensor} and batch {batch} is {each_ms!r}; "
                        "it must be above 0"
                    )
        if self.layers < 1 or self.layers_padded < self.layers:
            raise ValueError(
                f"layers is {self.layers} and layers_padded {self.layers_padded}; "
                "accepted is 1 <= layers <= layers_padded"
            )


def read_profile(table: Mapping[str, Any], source: str) -> LayerProfile:
    """From SpotServe's JSON; ValueError names the key that is missing or wrong."""
    try:
        init, incr = {}, {}
        for key, batches in table.items():
            if key.startswith("tp-"):
                for batch_key, each in batches.items():
                    at = int(key[3:]), int(batch_key.removeprefix("bsz-"))
                    init[at], incr[at] = float(each["init"]), float(each["incr"])
        return LayerProfile(
            layers=int(table["layer_num"]),
            layers_padded=int(table.get("padded_layer_num", table["layer_num"])),
            max_tensor=int(table.get("max_tp", max(tensor for tensor, _ in init))),
            init_ms=init,
            incr_ms=incr,
            embed_ms={2**power: float(each) for power, each in enumerate(table["embed"])},
            pp_init_comm_ms=float(table["pp_init_comm"]),
            pp_incr_comm_ms=float(table["pp_incr_comm"]),
            fix_factor=float(table["final_fix_factor"]),
            source=f"table of SpotServe, {source}",
        )
    except KeyError as error:
        raise ValueError(f"the profile {source} has no {error.args[0]!r}") from None


def latency_ms(
    profile: LayerProfile,
    tensor: int,
    pipeline: int,
    batch: int,
    micro: tuple[int, int],
    output_tokens: int,
) -> float:
    """Time to execute one batch of requests, as SpotServe's cost model has it."""
    deepest = -(-profile.layers // pipeline)
    of_prompt, of_tokens = micro
    init = profile.init_ms[tensor, batch // of_prompt] * deepest
    incr = profile.incr_ms[tensor, batch // of_tokens] * deepest
    prompt_ms = (init * (pipeline + of_prompt - 1) + profile.pp_init_comm_ms * (pipeline - 1)) / (
        of_prompt
    )
    token_ms = incr * (pipeline + of_tokens - 1)
    token_ms += profile.pp_incr_comm_ms * (pipeline - 1) / of_tokens
    total_ms = prompt_ms + token_ms * output_tokens + 2 * profile.embed_ms[batch]
    return total_ms * profile.fix_factor
