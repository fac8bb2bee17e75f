"""What is held, what can be done about it, and the contract of whoever decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from autoscale.catalog.offer import Offer
from autoscale.spot.events import SpotEvent

Memory_contra = TypeVar("Memory_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that was bought. It holds one replica, which answers from ready_s on. doomed_s:
    when the market will take it, if it has said so."""

    id: int
    offer: Offer
    launched_s: float
    ready_s: float
    doomed_s: float | None = None


@dataclass(frozen=True)
class Fleet:
    """All machines held, oldest first."""

    nodes: Sequence[Node] = ()

    def of(self, pool: str) -> list[Node]:
        """Machines of one offer, oldest first."""
        return [node for node in self.nodes if node.offer.name == pool]

    def ready(self, now_s: float) -> int:
        """Machines whose replica answers now."""
        return sum(node.ready_s <= now_s for node in self.nodes)

    def market(self, market: str) -> list[Node]:
        """Machines of one market, oldest first."""
        return [node for node in self.nodes if node.offer.market == market]


@dataclass(frozen=True)
class Launch:
    """Ask for `count` machines of an offer. The market may give fewer."""

    offer: Offer
    count: int
    reason: str


@dataclass(frozen=True)
class Terminate:
    """Give a machine back at once. Its replica has been drained or nobody waits for it."""

    node: int
    reason: str


@dataclass(frozen=True)
class Drain:
    """Send the machine no more work and give it back at deadline_s at the latest."""

    node: int
    deadline_s: float
    reason: str


Action = Launch | Terminate | Drain


class Memory(Protocol):
    """What a policy remembers. It changes in `observe` and nowhere else."""

    def observe(self, event: SpotEvent) -> None: ...


class SpotPolicy(Protocol[Memory_contra]):
    """Decides what to buy and give back so that `need` replicas answer.

    Pure: equal arguments give equal actions, and nothing is changed. Called again within the same
    moment after launches were refused, with the refusals in `risk`, until it asks for nothing more.
    """

    @property
    def name(self) -> str: ...

    def decide(
        self,
        now_s: float,
        need: int,
        fleet: Fleet,
        offers: Sequence[Offer],
        risk: Memory_contra,
    ) -> list[Action]: ...


def spot_offers(offers: Sequence[Offer]) -> list[Offer]:
    """Offers of the spot market, in the order given."""
    return [offer for offer in offers if offer.market == "spot"]


def cheapest_on_demand(offers: Sequence[Offer]) -> Offer:
    """The cheapest on-demand offer. ValueError when there is none: a floor needs one."""
    found = [offer for offer in offers if offer.market == "on_demand"]
    if not found:
        raise ValueError("offers: none is on_demand, and a policy that falls back needs one")
    return min(found, key=lambda offer: offer.usd_per_h)
