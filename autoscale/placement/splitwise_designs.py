"""What a design of a Splitwise cluster can carry within its limits, and the best split of its
machines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autoscale.placement.goodput import Arrival, poisson
from autoscale.placement.splitwise import Cluster, Machine, MachineTimes, Outcome, Pool

# Slowdowns against an idle DGX-A100 at percentiles 50, 90 and 99 (Splitwise, table VI).
TTFT_SLOWDOWN = (2.0, 3.0, 6.0)
TBT_SLOWDOWN = E2E_SLOWDOWN = (1.25, 1.5, 5.0)
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Kind:
    """Machines of a design: their times, and tokens whose keys and values fit in one."""

    times: MachineTimes
    kv_tokens: int


@dataclass(frozen=True)
class Design:
    """prompt and token machines with their numbers; or mixed ones alone, which do both."""

    name: str
    prompt: tuple[Kind, int] | None = None
    token: tuple[Kind, int] | None = None
    mixed: tuple[Kind, int] | None = None

    def machines(self) -> list[Machine]:
        groups: tuple[tuple[Pool, tuple[Kind, int] | None], ...] = (
            ("prompt", self.prompt),
            ("token", self.token),
            ("mixed", self.mixed),
        )
        return [
            Machine(group[0].times, pool, group[0].kv_tokens)
            for pool, group in groups
            if group is not None
            for _ in range(group[1])
        ]


def within_limits(
    arrivals: Sequence[Arrival], outcomes: Sequence[Outcome], reference: MachineTimes
) -> bool:
    """Whether slowdowns against an idle machine of `reference` times keep all nine limits."""
    ttft, tbt, e2e = [], [], []
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        first, each = reference.prompt_s(arrival.input_tokens), reference.token_s(1)
        ttft.append(outcome.ttft_s / first)
        e2e.append(outcome.e2e_s / (first + each * (arrival.output_tokens - 1)))
        if arrival.output_tokens > 1:
            tbt.append(outcome.tbt_s / each)
    limits = ((ttft, TTFT_SLOWDOWN), (tbt, TBT_SLOWDOWN), (e2e, E2E_SLOWDOWN))
    return all(bool((np.percentile(values, PERCENTILES) <= most).all()) for values, most in limits)


def throughput(
    design: Design,
    lengths: Sequence[tuple[int, int]],
    reference: MachineTimes,
    *,
    most: float,
    transfer_s: float = 0.0,
    seed: int = 0,
    tolerance: float = 0.02,
) -> float:
    """Most requests per second within all limits; 0.0 where not even a fiftieth of `most` is."""

    def holds(requests_per_s: float) -> bool:
        arrivals = poisson(lengths, requests_per_s, seed)
        outcomes = Cluster(design.machines(), transfer_s=transfer_s).run(arrivals)
        return within_limits(arrivals, outcomes, reference)

    low, high = 0.0, most
    while high - low > tolerance * high and high > most / 50:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def best_split(
    splits: Sequence[Design], measure: Callable[[Design], float]
) -> tuple[Design, float]:
    """The design of most throughput among splits in the order of their prompt machines: a few far
    apart first, then nearer ones around the best, as throughput rises to one peak and falls."""
    known: dict[int, float] = {}
    stride = max(1, len(splits) // 4)
    tried = set(range(stride // 2, len(splits), stride)) or {0}
    while True:
        for n in tried - known.keys():
            known[n] = measure(splits[n])
        best = max(known, key=lambda n: known[n])
        if stride == 1:
            return splits[best], known[best]
        stride = max(1, stride // 2)
        tried = {n for n in (best - stride, best + stride) if 0 <= n < len(splits)}
