"""A policy against a market, step by step in virtual time.

In each step the market takes machines back (the youngest first), it is noted whether enough
replicas answer, and the policy decides; refused launches are told to its memory and it decides
again, up to a budget of attempts, the same for every policy. A machine is paid for from its launch,
by the step.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from autoscale.simulate.market import Market
from autoscale.spot.events import SpotEvent
from autoscale.spot.fleet import Drain, Fleet, Launch, Memory, Node, SpotPolicy, Terminate


class Logged(NamedTuple):
    """One line of the action log."""

    t_s: float
    act: str
    offer: str
    machines: int
    reason: str


@dataclass
class Report:
    """What a replay came to, over its scored steps. Costs in dollars."""

    policy: str
    steps: int = 0
    served: int = 0  # steps in which enough replicas answered
    spot_usd: float = 0.0
    on_demand_usd: float = 0.0
    all_on_demand_usd: float = 0.0  # what the need alone costs on demand
    launches: int = 0
    refused: int = 0
    preempted: int = 0
    log: list[Logged] = field(default_factory=list)
    course: list[tuple[float, int, int, int]] = field(default_factory=list)  # t, need, ready, spot

    @property
    def availability(self) -> float:
        return self.served / self.steps

    @property
    def cost(self) -> float:
        """As a share of buying the need on demand."""
        return (self.spot_usd + self.on_demand_usd) / self.all_on_demand_usd


class Load(Protocol):
    """Requests beside a replay: what they need, and what becomes of them."""

    def need(self, period_s: float) -> int: ...

    def lost(self, now_s: float, nodes: Sequence[Node]) -> None: ...

    def advance(self, from_s: float, until_s: float, nodes: Sequence[Node]) -> None: ...


class Cloud:
    """Machines held in a market. Knows the trace, which the policy does not."""

    def __init__(self, market: Market, memory: Memory) -> None:
        self.market = market
        self.memory = memory
        self.nodes: dict[int, Node] = {}
        self._ids = itertools.count()
        self._column = {offer.name: place for place, offer in enumerate(market.spot)}
        self.count = {offer.name: 0 for offer in market.offers}

    def reclaim(self, step: int, now_s: float) -> list[Node]:
        """Take back what the market no longer has; the memory hears of losses, then of what is
        held."""
        lost: list[Node] = []
        for pool, column in self._column.items():
            over = self.count[pool] - int(self.market.capacity[step, column])
            if over > 0:
                mine = [node for node in self.nodes.values() if node.offer.name == pool]
                lost += sorted(mine, key=lambda node: (node.launched_s, node.id))[-over:]
        for node in lost:
            self.remove(node.id)
        for pool in dict.fromkeys(node.offer.name for node in lost):
            self.memory.observe(SpotEvent(now_s, pool, "preempt", self.count[pool]))
        for pool in self._column:
            self.memory.observe(SpotEvent(now_s, pool, "held", self.count[pool]))
        return lost

    def launch(self, action: Launch, step: int, now_s: float, most: int) -> tuple[int, int]:
        """(launched, refused), at most `most` attempts; stops at the first refusal."""
        offer = action.offer
        column = self._column.get(offer.name)
        for done in range(min(action.count, most) if column is not None else action.count):
            if column is not None and self.count[offer.name] >= self.market.capacity[step, column]:
                self.memory.observe(
                    SpotEvent(now_s, offer.name, "launch_fail", self.count[offer.name])
                )
                return done, 1
            node = Node(next(self._ids), offer, now_s, now_s + offer.startup_s)
            self.nodes[node.id] = node
            self.count[offer.name] += 1
            if column is not None:
                self.memory.observe(
                    SpotEvent(now_s, offer.name, "launch_ok", self.count[offer.name])
                )
        return (min(action.count, most) if column is not None else action.count), 0

    def remove(self, node: int) -> None:
        self.count[self.nodes.pop(node).offer.name] -= 1

    def fleet(self) -> Fleet:
        return Fleet(tuple(self.nodes.values()))


def replay(
    market: Market,
    policy: SpotPolicy[Any],
    memory: Memory,
    need: int | Load,
    *,
    scored_from: int = 0,
    attempts: int | None = None,
    log: bool = False,
) -> Report:
    """Run all steps of the market; the report counts those from scored_from on.

    need: replicas, constant or as a load says. attempts: spot launches in one step, 2 x pools by
    default, as a control loop of some 20 s makes in a step of some minutes.
    """
    cloud, report = Cloud(market, memory), Report(policy.name)
    budget = 2 * len(market.spot) if attempts is None else attempts
    for step in range(market.steps):
        now_s = step * market.period_s
        lost = cloud.reclaim(step, now_s)
        load = None if isinstance(need, int) else need
        if load:
            load.lost(now_s, lost)
        wanted = need if isinstance(need, int) else need.need(market.period_s)
        ready = cloud.fleet().ready(now_s)
        rounds = list(_rounds(cloud, policy, wanted, step, now_s, budget))
        if load:
            load.advance(now_s, now_s + market.period_s, cloud.fleet().nodes)
        if log:
            report.log += [line for acted in rounds for line in acted.lines]
        if step >= scored_from:
            _account(report, cloud, rounds, wanted, ready, len(lost))
            if log:
                report.course.append((now_s, wanted, ready, len(cloud.fleet().market("spot"))))
    return report


def _account(
    report: Report, cloud: Cloud, rounds: "list[Acted]", wanted: int, ready: int, lost: int
) -> None:
    """One scored step."""
    market = cloud.market
    hours = market.period_s / 3600
    floor = min(offer.usd_per_h for offer in market.offers if offer.market == "on_demand")
    spot_usd_per_h = sum(node.offer.usd_per_h for node in cloud.fleet().market("spot"))
    usd_per_h = sum(node.offer.usd_per_h for node in cloud.nodes.values())
    report.steps += 1
    report.served += ready >= wanted
    report.launches += sum(acted.launched for acted in rounds)
    report.refused += sum(acted.refused for acted in rounds)
    report.preempted += lost
    report.spot_usd += spot_usd_per_h * hours
    report.on_demand_usd += (usd_per_h - spot_usd_per_h) * hours
    report.all_on_demand_usd += wanted * floor * hours


class Acted(NamedTuple):
    """What one round of a step did."""

    launched: int
    refused: int
    lines: list[Logged]


def _rounds(
    cloud: Cloud, policy: SpotPolicy[Any], need: int, step: int, now_s: float, budget: int
) -> Iterator[Acted]:
    """Decide and act until the policy asks for nothing more or the attempts are used up."""
    while True:
        asking = budget > 0
        actions = policy.decide(now_s, need, cloud.fleet(), cloud.market.offers, cloud.memory)
        launched = refused = 0
        lines: list[Logged] = []
        for action in actions:
            if isinstance(action, Launch):
                spot = action.offer.market == "spot"
                if spot and (budget <= 0 or refused):
                    continue
                done, failed = cloud.launch(action, step, now_s, budget if spot else action.count)
                budget -= (done + failed) if spot else 0
                launched, refused = launched + done, refused + failed
                act = "launch" if not failed else "refused"
                lines.append(Logged(now_s, act, action.offer.name, done or failed, action.reason))
        if not (refused and asking):  # after a refusal it may want to keep what it would give back
            for action in actions:
                if isinstance(action, Terminate | Drain):
                    offer = cloud.nodes[action.node].offer.name
                    cloud.remove(action.node)
                    lines.append(Logged(now_s, "terminate", offer, 1, action.reason))
        yield Acted(launched, refused, lines)
        if not lines or not asking:
            return
