"""From offers, shapes and a profile to the groups of the integer program.

A column is an offer filled with one shape: so many machines hold so many replicas. Memory is
checked here: weights that do not fit, or requests whose keys and values do not, make a load
infinite.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autoscale.catalog.offer import Offer
from autoscale.placement.aggregate_model import Floats, Group, GroupRole, Instance, Pool, Tier
from autoscale.placement.demand import Bucket
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem

UNLIMITED = 10**6  # units of an offer without a quota
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
    groups, pools = _grouped(_loads(problem, of), of)
    kept = _undominated(groups, pools)
    place = {at: new for new, at in enumerate(kept)}
    return Instance(
        tuple(groups[at] for at in kept),
        len(buckets),
        slices,
        tuple(
            Pool(tuple(place[g] for g in pool.groups), pool.weights, pool.most) for pool in pools
        ),
    )


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


def _grouped(loads: Sequence[Floats], of: Sequence[Column]) -> tuple[list[Group], list[Pool]]:
    """Columns of equal loads become one group, unless their offer's quota is drawn on twice."""
    used = Counter(column.offer.name for column in of)
    together: dict[tuple[object, ...], list[int]] = {}
    for at, column in enumerate(of):
        shared = used[column.offer.name] > 1 and column.offer.quota is not None
        key = (column.shape.role, loads[at].tobytes(), at if shared else -1)
        together.setdefault(key, []).append(at)
    groups: list[Group] = []
    drawn: dict[str, list[int]] = {}
    for members in together.values():
        tiers = sorted(Tier(of[at].usd_per_h, of[at].most, at) for at in members if of[at].most > 0)
        group = Group(ROLES[of[members[0]].shape.role], loads[members[0]], tuple(tiers))
        if not tiers or group.most == 0:
            continue
        if used[of[members[0]].offer.name] > 1 and of[members[0]].offer.quota is not None:
            drawn.setdefault(of[members[0]].offer.name, []).append(len(groups))
        groups.append(group)
    return groups, [_pool(groups, of, members) for members in drawn.values()]


def _pool(groups: Sequence[Group], of: Sequence[Column], members: Sequence[int]) -> Pool:
    first = [of[groups[at].tiers[0].column] for at in members]
    quota = first[0].offer.quota
    assert quota is not None
    return Pool(tuple(members), tuple(column.machines for column in first), quota)


def _undominated(groups: Sequence[Group], pools: Sequence[Pool]) -> list[int]:
    """Groups that no other one beats in price and in every load. One that a quota can exhaust beats
    nothing; what shares a quota is kept."""
    pooled = {at for pool in pools for at in pool.groups}

    def beats(one: int, other: int) -> bool:
        a, b = groups[one], groups[other]
        if one == other or a.role != b.role or one in pooled or other in pooled:
            return False
        if a.tiers[-1].most < UNLIMITED or a.tiers[-1].usd_per_h > b.tiers[0].usd_per_h:
            return False
        same = bool((a.loads == b.loads).all()) and a.tiers[-1] == b.tiers[0]
        return bool((a.loads <= b.loads).all()) and not (same and one > other)

    return [b for b in range(len(groups)) if not any(beats(a, b) for a in range(len(groups)))]
