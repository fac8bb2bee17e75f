"""Why a plan is as it is, found by planning again with one thing changed: what binds it, what the
next best plans are, at what price another offer would be bought. Asks any planner, believes none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.offer import Offer
from autoscale.catalog.profile import LayerTimes, Phase, StepTimes
from autoscale.catalog.rates import shape_rate
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import Plan, ReplicaShape
from autoscale.placement.planner import Catalog, InfeasibleError, Planner, Problem

RELAXED = 1.25  # a limit that binds is tried this much wider
MORE_DEMAND = 1.1
HALVINGS = 7
SAME = 1e-6
MOST_ALTERNATIVES = 5


@dataclass(frozen=True)
class Replan:
    """A plan of a changed problem. what: the change. plan: None where there is none, `why` says."""

    what: str
    plan: Plan | None
    why: str = ""

    @property
    def usd_per_h(self) -> float:
        return self.plan.usd_per_h if self.plan else float("inf")


@dataclass(frozen=True)
class Asker:
    """Plans a problem again and again with one planner and one deadline."""

    planner: Planner
    problem: Problem
    deadline_s: float

    def replan(self, what: str, problem: Problem) -> Replan:
        try:
            return Replan(what, self.planner.plan(problem, deadline_s=self.deadline_s))
        except InfeasibleError as error:
            return Replan(what, None, str(error))

    def with_offers(self, what: str, change: Callable[[Offer], Offer | None]) -> Replan:
        """With each offer changed, or gone where `change` gives None."""
        catalog = ChangedCatalog(self.problem.catalog, change)
        return self.replan(what, replace(self.problem, catalog=catalog))


@dataclass(frozen=True)
class ChangedCatalog:
    """A catalogue whose offers are changed on the way out."""

    catalog: Catalog
    change: Callable[[Offer], Offer | None]

    def kind(self, name: str) -> GpuKind:
        return self.catalog.kind(name)

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]:
        changed = (self.change(offer) for offer in self.catalog.offers(at_s=at_s))
        return tuple(offer for offer in changed if offer is not None)


@dataclass(frozen=True)
class RoomierProfile:
    """A profile of the same steps with `factor` as much room for keys and values."""

    times: StepTimes
    room: Callable[[ReplicaShape], int]
    factor: float
    source: str

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        return self.times.step_s(shape, prefill_tokens, decode_sequences, context_tokens)

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return int(self.factor * self.room(shape))

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return shape_rate(self, shape, bucket, slo)


class RoomierLayers(RoomierProfile):
    """Of a profile that knows its layers too."""

    def layer_s(self, kind: str, phase: Phase, tokens: float) -> float:
        assert isinstance(self.times, LayerTimes)
        return self.times.layer_s(kind, phase, tokens)


def alternatives(asker: Asker, plan: Plan) -> list[Replan]:
    """Other plans, cheapest first: without each offer that is bought, of each kind alone, and with
    prefill and decode together where they are apart, or the reverse."""
    kinds = {offer.kind for offer in asker.problem.catalog.offers(at_s=asker.problem.at_s)}
    bought = dict.fromkeys(p.offer for p in plan.purchases if p.machines)
    tried = [asker.with_offers(f"without {name}", _without(name)) for name in bought]
    tried += [asker.with_offers(f"only {kind}", _only(kind)) for kind in sorted(kinds)]
    tried += _other_roles(asker, plan)
    tried.sort(key=lambda each: each.usd_per_h)
    seen, found = {_bill(plan)}, []
    for each in tried:
        if each.plan is None or _bill(each.plan) not in seen:
            found.append(each)
        if each.plan is not None:
            seen.add(_bill(each.plan))
    return found[:MOST_ALTERNATIVES]


def _other_roles(asker: Asker, plan: Plan) -> Iterator[Replan]:
    """Nothing where only one way was asked for."""
    shapes = asker.problem.shapes
    mixed = [shape for shape in shapes if shape.role == "mixed"]
    apart = [shape for shape in shapes if shape.role in ("prefill", "decode")]
    roles = {purchase.shape.role for purchase in plan.purchases}
    if mixed and roles & {"prefill", "decode"}:
        together = replace(asker.problem, shapes=mixed)
        yield asker.replan("prefill and decode together", together)
    elif apart and "mixed" in roles:
        yield asker.replan("prefill and decode apart", replace(asker.problem, shapes=apart))


def _bill(plan: Plan) -> frozenset[tuple[str, int, ReplicaShape, int]]:
    return frozenset((p.offer, p.machines, p.shape, p.replicas) for p in plan.purchases)


def _without(name: str) -> Callable[[Offer], Offer | None]:
    return lambda offer: None if offer.name == name else offer


def _only(kind: str) -> Callable[[Offer], Offer | None]:
    return lambda offer: offer if offer.kind == kind else None


@dataclass(frozen=True)
class Binding:
    """A limit made wider and what that saves; `usd_per_h` is what the plan then costs."""

    limit: str
    changed: str
    usd_per_h: float


def binding(asker: Asker, plan: Plan | None) -> list[Binding]:
    """The limits that bind a plan: those whose widening makes it cheaper, the most first. For no
    plan (None), those whose widening makes one possible."""
    cost = plan.usd_per_h if plan else float("inf")
    found = []
    for limit, changed, problem in _widened(asker.problem, plan):
        cheaper = asker.replan(changed, problem).usd_per_h
        if cheaper < cost - SAME * max(1.0, min(cost, cheaper)):
            found.append(Binding(limit, changed, cheaper))
    return sorted(found, key=lambda each: each.usd_per_h)


def _widened(problem: Problem, plan: Plan | None) -> Iterator[tuple[str, str, Problem]]:
    slo, demand = problem.demand.slo, problem.demand
    if slo.ttft_s is not None:
        wider = replace(slo, ttft_s=RELAXED * slo.ttft_s)
        yield (
            "slo, first token",
            f"{wider.ttft_s:g} s instead of {slo.ttft_s:g}",
            replace(problem, demand=replace(demand, slo=wider)),
        )
    if slo.tpot_s is not None:
        wider = replace(slo, tpot_s=RELAXED * slo.tpot_s)
        yield (
            "slo, gap of tokens",
            f"{wider.tpot_s:g} s instead of {slo.tpot_s:g}",
            replace(problem, demand=replace(demand, slo=wider)),
        )
    profile = problem.profile
    if isinstance(profile, StepTimes):
        kind = RoomierLayers if isinstance(profile, LayerTimes) else RoomierProfile
        source = f"{profile.source}, with room x {RELAXED:g}"
        roomier = kind(profile, profile.kv_tokens, RELAXED, source)
        changed = f"{RELAXED:g} times the room for keys and values"
        yield "memory", changed, replace(problem, profile=roomier)
    yield from _quotas(problem, plan)


def _quotas(problem: Problem, plan: Plan | None) -> Iterator[tuple[str, str, Problem]]:
    """One machine more of each offer that is used up; for no plan, no quota at all for any."""
    if plan is None:
        catalog = ChangedCatalog(problem.catalog, lambda offer: replace(offer, quota=None))
        yield "quota", "no quota at all", replace(problem, catalog=catalog)
        return
    for offer in problem.catalog.offers(at_s=problem.at_s):
        held = sum(p.machines for p in plan.purchases if p.offer == offer.name)
        if offer.quota is not None and held >= offer.quota > 0:
            catalog = ChangedCatalog(problem.catalog, _more_of(offer.name))
            changed = f"{offer.quota + 1} of {offer.name} instead of {offer.quota}"
            yield "quota", changed, replace(problem, catalog=catalog)


def _more_of(name: str) -> Callable[[Offer], Offer | None]:
    def change(offer: Offer) -> Offer:
        if offer.name != name or offer.quota is None:
            return offer
        return replace(offer, quota=offer.quota + 1)

    return change


def more_demand(asker: Asker) -> Replan:
    """The same with a tenth more requests."""
    demand = asker.problem.demand
    rates = {bucket: MORE_DEMAND * rate for bucket, rate in demand.requests_per_s.items()}
    changed = replace(asker.problem, demand=Demand(rates, demand.slo))
    return asker.replan(f"{MORE_DEMAND - 1:.0%} more requests", changed)


def break_even_usd_per_h(asker: Asker, offer: Offer) -> float | None:
    """The highest price at which an offer that is not bought would be, within 1 %; None where it
    would not be as a gift."""

    def bought_at(price: float) -> bool:
        def change(each: Offer) -> Offer:
            return replace(each, usd_per_h=price) if each.name == offer.name else each

        made = asker.with_offers(f"{offer.name} at {price:.4f}", change).plan
        return made is not None and any(
            p.offer == offer.name and p.machines for p in made.purchases
        )

    low, high = 0.0, offer.usd_per_h
    if not bought_at(1e-3 * offer.usd_per_h):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bought_at(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Choice:
    """What one kind of replica would do for requests of one bucket. requests_per_s: of a replica, 0
    where `why` says why not; usd_per_1000: of such requests at full load; share: in the plan."""

    offer: str
    shape: ReplicaShape
    requests_per_s: float
    usd_per_1000: float
    share: float
    why: str = ""


def choices(problem: Problem, plan: Plan, bucket: Bucket) -> list[Choice]:
    """Every offer in every shape for one bucket, cheapest first."""
    found = []
    for offer in problem.catalog.offers(at_s=problem.at_s):
        for shape in problem.shapes:
            if shape.kind != offer.kind or shape.tensor > offer.count:
                continue
            rate = problem.profile.requests_per_s(shape, bucket, problem.demand.slo)
            per_machine = offer.count / shape.accelerators
            cost = offer.usd_per_h / (per_machine * rate * 3.6) if rate > 0 else float("inf")
            share = sum(
                part
                for place, part in plan.routing.get(bucket, {}).items()
                if (plan.purchases[place].offer, plan.purchases[place].shape) == (offer.name, shape)
            )
            why = "" if rate > 0 else _why_not(problem, shape, bucket)
            found.append(Choice(offer.name, shape, rate, cost, share, why))
    return sorted(found, key=lambda choice: (choice.usd_per_1000, choice.offer))


def _why_not(problem: Problem, shape: ReplicaShape, bucket: Bucket) -> str:
    """Memory, the SLO, or the profile."""
    room = problem.profile.kv_tokens(shape)
    if room < sum(bucket):
        return f"memory: room for {room} of {sum(bucket)} tokens"
    slo = problem.demand.slo
    if problem.profile.requests_per_s(shape, bucket, Slo(attained=slo.attained)) <= 0:
        return "not measured, or beyond the table"
    for limit, rest in (
        ("first token", replace(slo, ttft_s=None)),
        ("gap of tokens", replace(slo, tpot_s=None)),
    ):
        if problem.profile.requests_per_s(shape, bucket, rest) > 0:
            return f"slo: {limit}"
    return "slo: first token and gap of tokens"
