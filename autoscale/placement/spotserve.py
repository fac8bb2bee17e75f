"""SpotServe's choice of data, pipeline and tensor degree and batch for the accelerators that there
are.

Asked whenever their number changes (Miao et al., "SpotServe", ASPLOS 2024, section 3.2): of the
configurations that serve the arrival rate take the one with the shortest time of execution; where
none does, the one with the highest throughput. `ParallelSpace.published` is what its artifact
searches; `wide` is all that the cost model can price. `preferred` adds what the paper asks for
beyond: among equals the fewest accelerators. `SpotServePlanner` is the same rule behind the
planners' protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate_columns import demanded, filling
from autoscale.placement.plan import Plan, Purchase, ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.spotserve_profile import LayerProfile, latency_ms


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
    trimmed = [_trimmed(each, requests_per_s) for each in every]
    equal = [
        each
        for each in trimmed
        if each.latency_ms <= best.latency_ms and each.requests_per_s >= requests_per_s
    ]
    return min(equal, key=lambda each: (each.accelerators, -each.requests_per_s))


def _trimmed(choice: ParallelChoice, requests_per_s: float) -> ParallelChoice:
    """With only as many pipelines as the rate needs."""
    each_per_s = choice.batch / choice.latency_ms * 1000
    data = next((n for n in range(1, choice.data) if n * each_per_s >= requests_per_s), choice.data)
    return replace(choice, data=data, requests_per_s=data * each_per_s)


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


class StepTimes(Protocol):
    """What a profile needs beside rates to be planned for so."""

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: int,
        decode_sequences: int,
        context_tokens: int,
    ) -> float:
        """Time of one engine step of a replica."""
        ...


@dataclass(frozen=True)
class Layout:
    """`replicas` of a shape, each answering `batch` requests at a time in latency_s."""

    shape: ReplicaShape
    batch: int
    latency_s: float
    replicas: int

    @property
    def requests_per_s(self) -> float:
        return self.replicas * self.batch / self.latency_s

    @property
    def accelerators(self) -> int:
        return self.replicas * self.shape.accelerators


@dataclass(frozen=True)
class SpotServePlanner:
    """SpotServe's rule over the shapes of a problem, on the machines that quotas say there are. It
    wants the shortest latency, not the least cost, so the plan's bound is 0. best_effort: where the
    rate cannot be served, the highest throughput instead of InfeasibleError."""

    max_batch: int = 8
    best_effort: bool = False
    name: str = "spotserve"

    def plan(self, problem: Problem, *, deadline_s: float = 10.0) -> Plan:
        if not hasattr(problem.profile, "step_s"):
            raise ValueError(f"the profile {problem.profile.source!r} has no step times; spotserve "
                             "needs one with step_s()")  # fmt: skip
        rate = problem.demand.total_per_s
        layouts = [each for each in self._layouts(problem) if each.replicas]
        meeting = [each for each in layouts if each.requests_per_s >= rate]
        if meeting:
            best = min(meeting, key=lambda each: (each.latency_s, each.accelerators))
            return _bought(problem, _fewest(best, rate))
        best_of = max(layouts, key=lambda each: each.requests_per_s, default=None)
        if best_of is None:
            raise InfeasibleError("memory: no shape fits on the machines that there are")
        if not self.best_effort:
            raise InfeasibleError(f"quota: at most {best_of.requests_per_s:.3g} of {rate:.3g} "
                                  "requests/s on the machines that there are")  # fmt: skip
        return _bought(problem, best_of)

    def _layouts(self, problem: Problem) -> Iterator[Layout]:
        tokens_in, tokens_out = _mean_tokens(problem)
        times = cast(StepTimes, problem.profile)
        for shape in problem.shapes:
            room = problem.profile.kv_tokens(shape)
            if shape.role != "mixed" or not room:
                continue
            replicas = sum(most for _, most in _places(problem, shape))
            for batch in _powers(self.max_batch):
                if batch * (tokens_in + tokens_out) <= room:
                    prompt_s = times.step_s(shape, batch * tokens_in, 0, tokens_in)
                    context = tokens_in + tokens_out // 2
                    token_s = times.step_s(shape, 0, batch, context)
                    yield Layout(shape, batch, prompt_s + tokens_out * token_s, replicas)


def _fewest(layout: Layout, requests_per_s: float) -> Layout:
    each_per_s = layout.batch / layout.latency_s
    needed = next(
        (n for n in range(1, layout.replicas) if n * each_per_s >= requests_per_s),
        layout.replicas,
    )
    return replace(layout, replicas=needed)


def _mean_tokens(problem: Problem) -> tuple[int, int]:
    rates, total = problem.demand.requests_per_s, problem.demand.total_per_s
    buckets = demanded(problem)
    if not buckets:
        raise ValueError("requests_per_s is empty; spotserve needs requests to plan for")
    tokens_in = sum(rates[b] * b.input_tokens for b in buckets) / total
    tokens_out = sum(rates[b] * b.output_tokens for b in buckets) / total
    return max(1, round(tokens_in)), max(1, round(tokens_out))


def _places(problem: Problem, shape: ReplicaShape) -> list[tuple[Offer, int]]:
    """Offers that the shape lies on, cheapest per replica first, with most replicas of each."""
    every = []
    for offer in problem.catalog.offers(at_s=problem.at_s):
        lies = filling(offer, shape) if offer.kind == shape.kind else None
        if lies is None:
            continue
        if offer.quota is None:
            raise ValueError(f"offer {offer.name} has no quota; spotserve plans for the machines "
                             "that there are, so each offer needs one")  # fmt: skip
        usd = offer.usd_per_h * lies.machines / lies.replicas
        every.append((usd, offer.name, offer, offer.quota // lies.machines * lies.replicas))
    return [(offer, most) for _, _, offer, most in sorted(every, key=lambda each: each[:2])]


def _bought(problem: Problem, layout: Layout) -> Plan:
    purchases: list[Purchase] = []
    left = layout.replicas
    for offer, most in _places(problem, layout.shape):
        taken = min(left, most)
        lies = filling(offer, layout.shape)
        if taken and lies:
            machines = -(-taken // lies.replicas) * lies.machines
            usd = machines * offer.usd_per_h
            purchases.append(Purchase(offer.name, machines, layout.shape, taken, usd))
            left -= taken
    shares = {at: each.replicas / layout.replicas for at, each in enumerate(purchases)}
    short = layout.requests_per_s < problem.demand.total_per_s
    return Plan(
        tuple(purchases),
        sum(each.usd_per_h for each in purchases),
        0.0,
        f"spotserve, batch {layout.batch}, {layout.latency_s:.3g} s a request",
        routing={bucket: shares for bucket in demanded(problem)},
        limits=("quota",) if short else (),
        sources=(problem.profile.source,),
    )


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
