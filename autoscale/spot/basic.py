"""The plain policies that others are measured against: all on-demand, one spot pool, even spread.

Each is as good as its rule allows: none goes on asking a pool that has refused in the same moment,
and none holds more than was needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from autoscale.catalog.offer import Offer
from autoscale.spot.events import SpotEvent
from autoscale.spot.fleet import (
    Action,
    Fleet,
    Launch,
    Node,
    Terminate,
    cheapest_on_demand,
    spot_offers,
)


@dataclass
class Refusals:
    """Which pools refused, and when last. The memory of the plain policies."""

    last_s: dict[str, float] = field(default_factory=dict)

    def observe(self, event: SpotEvent) -> None:
        if event.kind == "launch_fail":
            self.last_s[event.pool] = event.t_s

    def refused(self, pool: str, now_s: float) -> bool:
        """The pool has refused in this very moment."""
        return self.last_s.get(pool) == now_s


@dataclass(frozen=True)
class OnDemandPolicy:
    """`need` machines of the cheapest on-demand offer."""

    name: str = "on_demand"

    def decide(
        self, now_s: float, need: int, fleet: Fleet, offers: Sequence[Offer], risk: Refusals
    ) -> list[Action]:
        return _to(need, fleet.market("on_demand"), cheapest_on_demand(offers), "need")


@dataclass(frozen=True)
class SinglePoolPolicy:
    """`need` machines of one spot offer, asked for again and again."""

    pool: str
    name: str = "single"

    def decide(
        self, now_s: float, need: int, fleet: Fleet, offers: Sequence[Offer], risk: Refusals
    ) -> list[Action]:
        offer = next((offer for offer in offers if offer.name == self.pool), None)
        if offer is None:
            raise ValueError(
                f"pool {self.pool!r} is not offered; offers are "
                f"{', '.join(offer.name for offer in spot_offers(offers))}"
            )
        wanted = len(fleet.of(self.pool)) if risk.refused(self.pool, now_s) else need
        return _to(min(wanted, need), fleet.of(self.pool), offer, "need")


@dataclass(frozen=True)
class EvenSpreadPolicy:
    """`need` spot machines, the next always in the pool with the fewest that has not refused in
    this moment."""

    name: str = "even_spread"

    def decide(
        self, now_s: float, need: int, fleet: Fleet, offers: Sequence[Offer], risk: Refusals
    ) -> list[Action]:
        held = fleet.market("spot")
        if len(held) > need:
            return [Terminate(node.id, "more than needed") for node in held[need:]]
        open_pools = [o for o in spot_offers(offers) if not risk.refused(o.name, now_s)]
        if len(held) == need or not open_pools:
            return []
        fewest = min(open_pools, key=lambda offer: len(fleet.of(offer.name)))
        return [Launch(fewest, 1, "fewest held here")]


def _to(wanted: int, held: Sequence[Node], offer: Offer, reason: str) -> list[Action]:
    """From what is held of one offer to `wanted` of it; the youngest go first."""
    if len(held) < wanted:
        return [Launch(offer, wanted - len(held), reason)]
    return [Terminate(node.id, "more than needed") for node in held[wanted:]]
