"""How many machines of each offer can be had, over time: from a recorded trace, or made up.

A trace is steps: from `t_s` on, a pool has so many machines. Times count from the market's start.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from autoscale.catalog.offer import Offer

ROUNDING_S = 1e-6  # a time reckoned backwards from another may miss it by a hair


class Step(NamedTuple):
    """From t_s on, a pool (the machines of one offer) has so many."""

    t_s: float
    pool: str
    machines: int


@dataclass(frozen=True)
class LocalMarket:
    """offers: what can be asked for. steps: in the order of their times. A pool that no step names
    has as many as are asked for. notice_s: how long before a loss it is told."""

    offers: tuple[Offer, ...]
    steps: tuple[Step, ...]
    notice_s: float

    def __post_init__(self) -> None:
        names = {offer.name for offer in self.offers}
        unknown = sorted({step.pool for step in self.steps} - names)
        if unknown:
            raise ValueError(f"the trace names {unknown[0]!r}; offers are {sorted(names)}")
        if list(self.steps) != sorted(self.steps, key=lambda step: step.t_s):
            raise ValueError("the steps of a trace must be in the order of their times")

    def offer(self, name: str) -> Offer | None:
        """None where there is none of that name."""
        return next((offer for offer in self.offers if offer.name == name), None)

    def capacity(self, pool: str, at_s: float) -> int | None:
        """Machines to be had at a time; None for no limit."""
        found = [step.machines for step in self.steps if step.pool == pool and step.t_s <= at_s]
        return found[-1] if found else None

    def ahead(self, pool: str, from_s: float) -> Sequence[Step]:
        """Steps of a pool that are known at from_s: within the notice, and not yet there."""
        until_s = from_s + self.notice_s + ROUNDING_S
        return [s for s in self.steps if s.pool == pool and from_s < s.t_s <= until_s]

    def later(self, by_s: float) -> "LocalMarket":
        """The same market, whose steps after its beginning come by so much later."""
        moved = (s._replace(t_s=s.t_s + by_s) if s.t_s > 0 else s for s in self.steps)
        return replace(self, steps=tuple(moved))

    def instants(self, after_s: float, until_s: float) -> list[float]:
        """Times in (after_s, until_s] at which something may be told or taken."""
        told = [step.t_s - self.notice_s for step in self.steps]
        both = {*told, *(step.t_s for step in self.steps)}
        return sorted(t for t in both if after_s < t <= until_s)


def read_spotserve(
    path: Path, counts_node: Callable[[str], bool] = lambda _: True
) -> list[tuple[float, int]]:
    """(seconds, machines from then on) of a trace in SpotServe's format: a JSON list a line,
    `[milliseconds, "add" | "remove" | "DONE", {"nodes": [names]}]`. counts_node: which of the nodes
    are counted. ValueError names the line."""
    there: set[str] = set()
    counts: list[tuple[float, int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            at_ms, act, body = json.loads(line)
            nodes = {name for name in body["nodes"] if counts_node(name)}
            known = {"add": there | nodes, "remove": there - nodes, "DONE": there}
            there = known[act]
            counts.append((float(at_ms) / 1000, len(there)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no step of a trace: {error}") from None
    return counts


def scaled(
    counts: Iterable[tuple[float, int]], pool: str, *, most: int, compress: float
) -> list[Step]:
    """The steps of one pool: the trace's largest number becomes `most`, others in proportion and
    rounded down, and time runs `compress` times as fast. Steps that change nothing stay out."""
    counts = list(counts)
    peak = max(count for _, count in counts)
    steps: list[Step] = []
    for at_s, count in counts:
        step = Step(at_s / compress, pool, count * most // peak)
        if not steps or steps[-1].machines != step.machines:
            steps.append(step)
    return steps
