"""SpotHedge, the policy of SkyServe, as the baseline that ours is held against.

Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with Spot Instances", EuroSys 25;
rules as SkyPilot's spot placer `dynamic_fallback` and its fallback autoscaler have them. A pool
that takes a machine back or refuses one is set aside; when fewer than two are left, all are taken
back. The next machine goes to the cheapest pool not in use, else the cheapest. On-demand machines
fill up what spot machines do not answer yet, over-provisioning included, but never more than is
needed.
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
class Placer:
    """Which pools are active. pools: all of them."""

    pools: tuple[str, ...]
    active: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.pools) < 2:
            raise ValueError(
                f"spot offers: {len(self.pools)} given, SpotHedge needs at least 2 to move between"
            )
        self.active = set(self.pools)

    def observe(self, event: SpotEvent) -> None:
        if event.kind == "launch_ok":
            self.active.add(event.pool)
        elif event.kind in ("launch_fail", "preempt"):
            self.active.discard(event.pool)
            if len(self.active) < 2:
                self.active = set(self.pools)


@dataclass(frozen=True)
class HedgePolicy:
    """over: spot machines beyond the need."""

    over: int = 2
    name: str = "spothedge"

    def decide(
        self, now_s: float, need: int, fleet: Fleet, offers: Sequence[Offer], risk: Placer
    ) -> list[Action]:
        target = need + self.over
        spot = fleet.market("spot")
        actions: list[Action] = []
        if len(spot) < target:
            actions.append(Launch(self._next(fleet, offers, risk), 1, "next active pool"))
        actions += [Terminate(node.id, "more than the target") for node in spot[target:]]
        ready = sum(node.ready_s <= now_s for node in spot[:target])
        return actions + self._fallback(min(need, target - ready), fleet, offers)

    def _next(self, fleet: Fleet, offers: Sequence[Offer], placer: Placer) -> Offer:
        """The cheapest active pool not in use, else the cheapest active; the first of equals."""
        used = {node.offer.name for node in fleet.nodes}
        active = [offer for offer in spot_offers(offers) if offer.name in placer.active]
        unused = [offer for offer in active if offer.name not in used]
        return min(unused or active, key=lambda offer: offer.usd_per_h)

    def _fallback(self, wanted: int, fleet: Fleet, offers: Sequence[Offer]) -> list[Action]:
        held: list[Node] = fleet.market("on_demand")
        if len(held) < wanted:
            count = wanted - len(held)
            return [Launch(cheapest_on_demand(offers), count, "spot machines are not ready")]
        return [Terminate(node.id, "spot machines are ready") for node in held[wanted:]]
