"""From offers, shapes and a profile to the groups of the integer program.

A column is an offer filled with one shape: so many machines hold so many replicas. Memory is
checked here: weights that do not fit, or requests whose keys and values do not, make a load
infinite.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate_model import (
    UNLIMITED,
    Floats,
    Group,
    GroupRole,
    Instance,
    Pool,
    Tier,
)
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem

ROLES: dict[str, GroupRole] = {"mixed": "mixed", "prefill": "prefill", "decode": "decode"}
Price = Callable[[Offer, ReplicaShape], float]


@dataclass(frozen=True)
class Column:
    """One unit: `machines` of an offer that hold `replicas` of a shape. usd_per_h: of the unit, as
    the objective counts it. requests_per_s: by bucket, of the unit."""

    offer: Offer
    shape: ReplicaShape
    machines: int
    replicas: int
    usd_per_h: float
    requests_per_s: tuple[float, ...]
    short_of_memory: tuple[bool, ...]

    @property
    def most(self) -> int:
        return UNLIMITED if self.offer.quota is None else self.offer.quota // self.machines


class Filling(NamedTuple):
    """How a shape lies on machines of an offer."""

    machines: int
    replicas: int


def filling(offer: Offer, shape: ReplicaShape) -> Filling | None:
    """As many copies as fit on one machine, else one copy over several, whose stages stay whole;
    None where the tensor degree is above a machine's accelerators."""
    if shape.accelerators <= offer.count:
        return Filling(1, offer.count // shape.accelerators)
    if shape.tensor > offer.count:
        return None
    stages = offer.count // shape.tensor
    return Filling(-(-shape.pipeline // stages), 1)


def bill(offer: Offer, shape: ReplicaShape) -> float:
    """The price on the offer, $/h per machine."""
    return offer.usd_per_h


def demanded(problem: Problem) -> list[Bucket]:
    """Buckets that are asked for at all; ValueError for a rate below 0."""
    for bucket, rate in problem.demand.requests_per_s.items():
        if not rate >= 0:
            raise ValueError(f"requests_per_s of {bucket} is {rate!r}; accepted is 0 or more")
    return sorted(b for b, rate in problem.demand.requests_per_s.items() if rate > 0)


def columns(problem: Problem, price: Price = bill) -> list[Column]:
    """Every offer with every shape that lies on it and serves some bucket or other."""
    buckets = demanded(problem)
    every = []
    for offer in problem.catalog.offers(at_s=problem.at_s):
        if not offer.usd_per_h > 0:
            raise ValueError(f"usd_per_h of offer {offer.name} is {offer.usd_per_h!r}; "
                             "accepted is above 0")  # fmt: skip
        for shape in problem.shapes:
            lies = filling(offer, shape) if shape.kind == offer.kind else None
            if lies is None or shape.role not in ROLES:
                continue
            rates, short = _rates(problem, shape, buckets)
            every.append(
                Column(
                    offer,
                    shape,
                    lies.machines,
                    lies.replicas,
                    lies.machines * price(offer, shape),
                    tuple(rate * lies.replicas for rate in rates),
                    tuple(short),
                )
            )
    return every


def instance(problem: Problem, of: Sequence[Column], slices: int | None) -> Instance:
    """The program over these columns. InfeasibleError where some bucket has none."""
    buckets = demanded(problem)
    for at, bucket in enumerate(buckets):
        if not _served(of, at):
            raise InfeasibleError(why_unserved(of, at, bucket))
    groups = _undominated(_grouped(_loads(problem, of), of))
    return Instance(tuple(groups), len(buckets), slices, tuple(_pools(groups, of)))


def why_unserved(of: Sequence[Column], at: int, bucket: Bucket) -> str:
    """What keeps every column from a bucket."""
    asked = f"requests of {bucket.input_tokens} tokens in and {bucket.output_tokens} out"
    if not of:
        return f"{asked} have no offer of a kind and size that any shape lies on"
    if all(column.short_of_memory[at] for column in of):
        return f"memory: {asked} fit on none of {len(of)} offers with a shape"
    return f"slo: {asked} are served within it by none of {len(of)} offers with a shape"


def _rates(
    problem: Problem, shape: ReplicaShape, buckets: Sequence[Bucket]
) -> tuple[list[float], list[bool]]:
    room_tokens = problem.profile.kv_tokens(shape)
    rates, short = [], []
    for bucket in buckets:
        held = bucket.input_tokens + (0 if shape.role == "prefill" else bucket.output_tokens)
        short.append(room_tokens < held)
        fits = room_tokens >= held
        slo = problem.demand.slo
        rates.append(problem.profile.requests_per_s(shape, bucket, slo) if fits else 0.0)
    return rates, short


def _served(of: Sequence[Column], bucket: int) -> bool:
    roles = {column.shape.role for column in of if column.requests_per_s[bucket] > 0}
    return "mixed" in roles or {"prefill", "decode"} <= roles


def _loads(problem: Problem, of: Sequence[Column]) -> list[Floats]:
    asked = np.array([problem.demand.requests_per_s[b] for b in demanded(problem)])
    with np.errstate(divide="ignore"):
        return [asked / np.array(column.requests_per_s) for column in of]


def _grouped(loads: Sequence[Floats], of: Sequence[Column]) -> list[Group]:
    """Columns that hold as many replicas of the same shape are one group, which needs no tier above
    an unlimited one."""
    together: dict[tuple[ReplicaShape, int], list[int]] = {}
    for at, column in enumerate(of):
        if column.most > 0 and np.isfinite(loads[at]).any():
            together.setdefault((column.shape, column.replicas), []).append(at)
    groups = []
    for members in together.values():
        tiers: list[Tier] = []
        for tier in sorted(Tier(of[at].usd_per_h, of[at].most, at) for at in members):
            tiers.append(tier)
            if tier.most == UNLIMITED:
                break
        groups.append(Group(ROLES[of[members[0]].shape.role], loads[members[0]], tuple(tiers)))
    return groups


def _pools(groups: Sequence[Group], of: Sequence[Column]) -> list[Pool]:
    """Quotas that more than one column draws on."""
    drawn: dict[str, list[int]] = {}
    for group in groups:
        for tier in group.tiers:
            if of[tier.column].offer.quota is not None:
                drawn.setdefault(of[tier.column].offer.name, []).append(tier.column)
    return [
        Pool(
            tuple(members),
            tuple(of[at].machines for at in members),
            of[members[0]].offer.quota or 0,
        )
        for members in drawn.values()
        if len(members) > 1
    ]


def _undominated(groups: Sequence[Group]) -> list[Group]:
    """Groups that no other one without a limit beats in price and in every load; of equal ones the
    first."""

    def beats(one: int, other: int) -> bool:
        a, b = groups[one], groups[other]
        dearest = a.tiers[-1]
        if one == other or a.role != b.role or not a.unlimited:
            return False
        if dearest.usd_per_h > b.tiers[0].usd_per_h or (a.loads > b.loads).any():
            return False
        equal = dearest.usd_per_h == b.tiers[0].usd_per_h and bool((a.loads == b.loads).all())
        return one < other or not equal

    every = range(len(groups))
    return [groups[b] for b in every if not any(beats(a, b) for a in every)]
