"""SpotServe's choice of data, pipeline and tensor degree and batch for the accelerators that there are.

Asked whenever their number changes (Miao et al., "SpotServe", ASPLOS 2024, section 3.2): of the
configurations that serve the arrival rate take the one with the shortest time of execution; where
none does, the one with the highest throughput. Times come from its profiles: milliseconds per layer
by tensor degree and batch. `ParallelSpace.published` is what its artifact searches; `wide` is all
that the cost model can price. `preferred` adds what the paper asks for beyond: among equals the
fewest accelerators.
"""

from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class ParallelChoice:
    """`data` pipelines of `pipeline` stages of `tensor` accelerators, `batch` requests each.

    micro_init, micro_incr: microbatches that a batch is cut into for prompts and for tokens."""

    data: int
    tensor: int
    pipeline: int
    batch: int
    micro_init: int
    micro_incr: int
    latency_ms: float
    requests_per_s: float

    @property
    def accelerators(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class ParallelSpace:
    """What is searched. min_accelerators: fewest that hold one copy of the weights. dividing: only
    pipelines whose depth divides the padded number of layers."""

    min_accelerators: int
    max_batch: int = 4
    dividing: bool = True

    @classmethod
    def published(cls, min_accelerators: int, max_batch: int = 4) -> "ParallelSpace":
        return cls(min_accelerators, max_batch)

    @classmethod
    def wide(cls, min_accelerators: int, max_batch: int = 4) -> "ParallelSpace":
        """Any depth up to one layer per stage."""
        return cls(min_accelerators, max_batch, dividing=False)


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


def choices(
    profile: LayerProfile, space: ParallelSpace, accelerators: int, output_tokens: int
) -> Iterator[ParallelChoice]:
    """Every configuration of the space with as many pipelines as fit, small degrees first."""
    for tensor, pipeline in _depths(profile, space, accelerators):
        data = accelerators // (tensor * pipeline)
        for batch in _powers(space.max_batch):
            for of_prompt in _powers(batch):
                for of_tokens in _powers(batch):
                    micro = of_prompt, of_tokens
                    each_ms = latency_ms(profile, tensor, pipeline, batch, micro, output_tokens)
                    rate = data * batch / each_ms * 1000
                    yield ParallelChoice(data, tensor, pipeline, batch, *micro, each_ms, rate)


def choose(
    profile: LayerProfile,
    space: ParallelSpace,
    accelerators: int,
    requests_per_s: float,
    output_tokens: int = 128,
) -> ParallelChoice | None:
    """SpotServe's rule; None when not even one copy of the weights fits."""
    every = list(choices(profile, space, accelerators, output_tokens))
    meeting = [each for each in every if each.requests_per_s >= requests_per_s]
    if meeting:
        return min(meeting, key=lambda each: each.latency_ms)
    return max(every, key=lambda each: each.requests_per_s, default=None)


def preferred(
    profile: LayerProfile,
    space: ParallelSpace,
    accelerators: int,
    requests_per_s: float,
    output_tokens: int = 128,
) -> ParallelChoice | None:
    """The same rule with as few pipelines as the rate needs: no slower, never more accelerators."""
    best = choose(profile, space, accelerators, requests_per_s, output_tokens)
    if best is None or best.requests_per_s < requests_per_s:
        return best
    every = choices(profile, space, accelerators, output_tokens)
    equal = [
        each
        for each in map(lambda each: _trimmed(each, requests_per_s), every)
        if each.latency_ms <= best.latency_ms and each.requests_per_s >= requests_per_s
    ]
    return min(equal, key=lambda each: (each.accelerators, -each.requests_per_s))


def _trimmed(choice: ParallelChoice, requests_per_s: float) -> ParallelChoice:
    """With only as many pipelines as the rate needs."""
    each_per_s = choice.batch / choice.latency_ms * 1000
    data = next(
        (n for n in range(1, choice.data) if n * each_per_s >= requests_per_s), choice.data
    )
    return ParallelChoice(
        data,
        choice.tensor,
        choice.pipeline,
        choice.batch,
        choice.micro_init,
        choice.micro_incr,
        choice.latency_ms,
        data * each_per_s,
    )


def committed_tokens(
    profile: LayerProfile, choice: ParallelChoice, grace_s: float, migration_s: float
) -> int:
    """Most tokens that a batch can still make before its accelerators go: the largest S with
    l_exe(S) < grace - migration (section 4.2); 0 when not even the prompt is through."""
    left_ms = (grace_s - migration_s) * 1000
    micro = choice.micro_init, choice.micro_incr
    shape = choice.tensor, choice.pipeline, choice.batch
    first_ms = latency_ms(profile, *shape, micro, 0)
    each_ms = latency_ms(profile, *shape, micro, 1) - first_ms
    tokens = max(0, int((left_ms - first_ms) / each_ms))
    while tokens and first_ms + tokens * each_ms >= left_ms:
        tokens -= 1
    return tokens


def _depths(
    profile: LayerProfile, space: ParallelSpace, accelerators: int
) -> Iterator[tuple[int, int]]:
    if accelerators < space.min_accelerators:
        return
    for tensor in _powers(min(profile.max_tensor, accelerators)):
        fewest = -(-space.min_accelerators // tensor)
        for pipeline in range(fewest, accelerators // tensor + 1):
            if not space.dividing and pipeline > profile.layers:
                break
            if not space.dividing or profile.layers_padded % pipeline == 0:
                yield tensor, pipeline


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to most."""
    return [2**power for power in range(most.bit_length())]
