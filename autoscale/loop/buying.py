"""Which machines a role gets and which it can do without: the spot policy's word, within cap, quota
and what refused lately.

The policy is asked again with what it has just asked for, until it asks for nothing more. Machines
of offers that it does not weigh are shown to it as on-demand ones; what the floor wants on demand
is not shown at all. Where it cannot have its way and too few would come, the next best offer is
taken.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from autoscale.catalog.offer import Offer
from autoscale.loop.turn import Member, Turn
from autoscale.spot.belief import SpotRisk
from autoscale.spot.fleet import Fleet, Launch, Node, SpotPolicy, Terminate


class Surplus(NamedTuple):
    """Members that the policy would give back, of one offer as it sees them; `many` of them may
    go."""

    members: list[Member]
    many: int
    reason: str


class Wish(NamedTuple):
    """What is left to decide after buying. target: machines that the policy wants in all."""

    surplus: list[Surplus]
    target: int


def buy(turn: Turn, role: str, policy: SpotPolicy[Any]) -> Wish:
    """Launch what the role lacks, and say what it could do without."""
    need = turn.minds[role].need
    if need == 0:
        return Wish([Surplus(turn.members(role), len(turn.members(role)), "none are needed")], 0)
    _floor_on_demand(turn, role, need)
    if not any(offer.market == "on_demand" for offer in turn.signals.offers):
        _fill(turn, role, need, "nothing is offered on demand")
        members = turn.members(role)
        more = len(members) - need
        return Wish([Surplus(members, more, "more than needed")] if more > 0 else [], need)
    wish, cut = _policy(turn, role, need, policy)
    least = need if cut else turn.scale(role).floor
    _fill(turn, role, least, cut or "the policy would go below the floor")
    return wish


def _floor_on_demand(turn: Turn, role: str, need: int) -> None:
    """As many on demand as the settings always want."""
    wanted = min(turn.scale(role).on_demand, need)
    have = sum(member.offer.market == "on_demand" for member in turn.members(role))
    offers = [offer for offer in by_price(turn) if offer.market == "on_demand"]
    for _ in range(wanted - have):
        if not _first_open(turn, role, offers, "always on demand"):
            turn.trouble[role] = "no on-demand offer is open"
            return


def _policy(turn: Turn, role: str, need: int, policy: SpotPolicy[Any]) -> tuple[Wish, str]:
    """Ask until it asks for nothing more. The second part says why it did not get all, "" if it
    did."""
    cut = ""
    for _ in range(1 + turn.scale(role).cap):
        shown, base = _shown(turn, role, need)
        nodes = [node for node, _ in shown]
        asked = policy.decide(
            turn.now_s, need - base, Fleet(nodes), turn.signals.offers, _memory(turn, role)
        )
        got = 0
        for action in asked:
            if isinstance(action, Launch):
                had, why = _ask(turn, role, action)
                got, cut = got + had, cut or why
        if not got:
            break
    if cut:
        turn.trouble[role] = cut
    wanted = sum(action.count for action in asked if isinstance(action, Launch))
    parting = [action for action in asked if not isinstance(action, Launch)]
    target = base + len(nodes) + wanted - len(parting)
    return Wish(_surplus(shown, parting), target), cut


def _ask(turn: Turn, role: str, action: Launch) -> tuple[int, str]:
    """As many of them as may be bought, and why not more."""
    for got in range(action.count):
        if len(turn.members(role)) >= turn.scale(role).cap:
            return got, f"the cap of {turn.scale(role).cap} is reached"
        if not turn.is_open(action.offer):
            return got, _why_closed(turn, action.offer)
        turn.launch(role, action.offer, action.reason)
    return action.count, ""


def _why_closed(turn: Turn, offer: Offer) -> str:
    if offer.quota is not None and turn.bought(offer.name) >= offer.quota:
        return f"the quota of {offer.quota} for {offer.name} is used up"
    shut = turn.shut[offer.name]
    return f"{offer.name} refused {shut.times} times ({shut.kind})"


def _fill(turn: Turn, role: str, least: int, why: str) -> None:
    """Up to `least` members, whatever is open: on demand first, then by price."""
    for _ in range(least - len(turn.members(role))):
        if not _first_open(turn, role, by_price(turn), why):
            turn.trouble[role] = f"{why}, and no other offer is open"
            return


def _first_open(turn: Turn, role: str, offers: Sequence[Offer], why: str) -> bool:
    if len(turn.members(role)) >= turn.scale(role).cap:
        return False
    offer = next((offer for offer in offers if turn.is_open(offer)), None)
    if offer is not None:
        turn.launch(role, offer, why)
    return offer is not None


def by_price(turn: Turn) -> list[Offer]:
    """On demand before spot, the cheapest first."""
    return sorted(turn.signals.offers, key=lambda offer: (offer.market == "spot", offer.usd_per_h))


def _shown(turn: Turn, role: str, need: int) -> tuple[list[tuple[Node, Member]], int]:
    """The fleet as the policy sees it, and how many on-demand machines it does not see."""
    hidden = min(turn.scale(role).on_demand, need)
    weighed = {offer.name for offer in turn.signals.offers if offer.market == "spot"}
    if isinstance(turn.memory, SpotRisk):
        weighed &= set(turn.memory.chain.pools)
    fallback = next(offer for offer in by_price(turn) if offer.market == "on_demand")
    shown, base = [], 0
    for place, member in enumerate(turn.members(role)):
        if member.offer.market == "on_demand" and base < hidden:
            base += 1
            continue
        offer = member.offer if member.offer.name in weighed else fallback
        ready_s = member.launched_s if member.stage == "ready" else _ready_s(turn, member)
        shown.append((Node(place, offer, member.launched_s, ready_s), member))
    return shown, base


def _ready_s(turn: Turn, member: Member) -> float:
    """When it might answer: not yet."""
    return max(turn.now_s + 1.0, member.launched_s + member.offer.startup_s)


def _memory(turn: Turn, role: str) -> Any:
    """What is believed, beside the machines that others hold of the same pools."""
    if not isinstance(turn.memory, SpotRisk):
        return turn.memory
    own = [member.offer.name for member in turn.members(role) if member.stage != "asked"]
    pools = turn.memory.chain.pools
    return turn.memory.beside(
        {
            pool: sum(machine.offer == pool for machine in turn.signals.machines) - own.count(pool)
            for pool in pools
        }
    )


def _surplus(shown: list[tuple[Node, Member]], parting: Sequence[Any]) -> list[Surplus]:
    """By offer as the policy sees it; which of them go is not its matter."""
    reasons = {action.node: action.reason for action in parting if isinstance(action, Terminate)}
    by_offer: dict[str, Surplus] = {}
    for node, member in shown:
        entry = by_offer.setdefault(node.offer.name, Surplus([], 0, ""))
        entry.members.append(member)
        if node.id in reasons:
            more = entry._replace(many=entry.many + 1, reason=reasons[node.id])
            by_offer[node.offer.name] = more
    return [entry for entry in by_offer.values() if entry.many]


def at_risk(turn: Turn, offer: Offer) -> float:
    """Chance that a full holding of this offer loses something while a new machine starts; 0 where
    nothing is known."""
    if not isinstance(turn.memory, SpotRisk) or offer.name not in turn.memory.chain.pools:
        return 0.0
    chain = turn.memory.chain
    kept = turn.memory.survivors(offer.startup_s)[chain.pools.index(offer.name)]
    return 1 - float(kept[chain.top, chain.top])
