"""Answers to `sanderling plan --explain`: why an offer is bought or not, and where the requests
of a bucket go and why."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket
from autoscale.placement.explain import Asker, Choice, break_even_usd_per_h, choices
from autoscale.placement.plan import Plan
from autoscale.placement.planner import Problem
from autoscale.plan_json import choice_json


@dataclass(frozen=True)
class Explanation:
    """The answer to one --explain. figures: as JSON."""

    sentences: tuple[str, ...]
    table: tuple[Choice, ...]
    figures: dict[str, Any]


def reader_of(decision: str, problem: Problem) -> Callable[[Plan, Asker], Explanation]:
    """What answers --explain `decision`. ValueError for what is neither an offer nor a bucket."""
    offers = {offer.name: offer for offer in problem.catalog.offers(at_s=problem.at_s)}
    if decision in offers:
        return lambda plan, asker: _explain_offer(offers[decision], plan, asker)
    found = re.fullmatch(r"(\d+)x(\d+)", decision)
    bucket = Bucket(int(found[1]), int(found[2])) if found else Bucket(0, 0)
    if bucket in problem.demand.requests_per_s:
        return lambda plan, asker: _explain_bucket(bucket, plan, asker)
    buckets = [f"{b[0]}x{b[1]}" for b in problem.demand.requests_per_s]
    raise ValueError(
        f"--explain {decision} is not accepted; it takes an offer ({', '.join(offers)}) or a "
        f"bucket ({', '.join(buckets)})"
    )


def _explain_offer(offer: Offer, plan: Plan, asker: Asker) -> Explanation:
    machines = sum(p.machines for p in plan.purchases if p.offer == offer.name)
    if machines:
        other = asker.with_offers(
            f"without {offer.name}", lambda each: None if each.name == offer.name else each
        )
        without = f"the plan costs {other.usd_per_h:.3g} $/h" if other.plan else "there is no plan"
        sentences = (
            f"{machines} of {offer.name} at {offer.usd_per_h:g} $/h are bought.",
            f"Without that offer {without}; with it {plan.usd_per_h:.3g}.",
        )
        usd = other.usd_per_h if other.plan else None
        return Explanation(
            sentences, (), {"offer": offer.name, "machines": machines, "without": usd}
        )
    price = break_even_usd_per_h(asker, offer)
    if price is None:
        said = f"It would not be bought as a gift: {_useless(offer, plan, asker.problem)}."
    else:
        said = f"At about {price:.3g} $/h or less it would be."
    sentences = (f"{offer.name} at {offer.usd_per_h:g} $/h is not bought.", said)
    return Explanation(sentences, (), {"offer": offer.name, "machines": 0, "break_even": price})


def _useless(offer: Offer, plan: Plan, problem: Problem) -> str:
    """Why an offer serves nothing, in the words of its first bucket that says why."""
    for bucket in problem.demand.requests_per_s:
        for choice in choices(problem, plan, bucket):
            if choice.offer == offer.name and choice.why:
                return f"requests of {bucket[0]} + {bucket[1]} tokens, {choice.why}"
    return "it adds nothing that the others do not hold already"


def _explain_bucket(bucket: Bucket, plan: Plan, asker: Asker) -> Explanation:
    found = tuple(choices(asker.problem, plan, bucket))
    best = next((choice for choice in found if choice.requests_per_s > 0), None)
    head = f"Requests of {bucket[0]} + {bucket[1]} tokens"
    said = (
        [f"{head} cost least on {best.offer}: {best.usd_per_1000:.3g} $ for 1,000."] if best else []
    )
    others = [c.offer for c in found if c.share > 0 and best and c.offer != best.offer]
    if others:
        room = "machines come whole, and it costs less to fill what is bought for others"
        said.append(f"Some go to {', '.join(dict.fromkeys(others))}: {room}.")
    figures = {"bucket": list(bucket), "choices": [choice_json(choice) for choice in found]}
    return Explanation(tuple(said), found, figures)
