"""Which machines go, in which order, and what stays in any case.

First those that were only asked for or are pending, then those that are starting, then spot
machines (the likeliest to be lost first), then on-demand ones. None goes whose going would leave
fewer answering than needed: a replacement has to answer first.
"""

from autoscale.loop.actions import Return, Terminate
from autoscale.loop.buying import Surplus, Wish, at_risk
from autoscale.loop.training import taker
from autoscale.loop.turn import Member, Turn

ORDER = {"asked": 0, "pending": 0, "starting": 1, "ready": 2}
MARGIN = 0.1  # of a notice, kept free before its end


def doomed(turn: Turn) -> None:
    """What the market will take counts no more, so that a replacement is bought at once, and serves
    on as long as its work can still leave it in time. Then it is drained, whatever is needed."""
    for machine in turn.signals.machines:
        if machine.doomed_s is None or machine.id in turn.leaving or not turn.serves(machine):
            continue
        left_s = machine.doomed_s - turn.now_s
        drain_s = turn.settings.drain_s
        if machine.phase == "ready" and left_s > drain_s * (1 + MARGIN) + turn.settings.period_s:
            continue
        empty = machine.phase in ("pending", "starting")
        wait_s = min(drain_s, max(0.0, left_s * (1 - MARGIN)))
        deadline_s = turn.now_s + (0.0 if empty else wait_s)
        turn.leave(machine.id, deadline_s, f"the market takes it in {left_s:.0f} s")


def part(turn: Turn, role: str, wish: Wish) -> None:
    """Let go what the policy can do without, in order, as far as the rest is enough."""
    need, members = turn.minds[role].need, turn.members(role)
    answering = sum(member.stage == "ready" for member in members)
    kept = len(members)
    over = kept - turn.scale(role).cap
    least = min(wish.target, turn.scale(role).cap)
    if kept <= max(least, need):
        return
    surplus = list(wish.surplus)
    if over > 0:
        surplus.insert(0, Surplus(members, over, f"above the cap of {turn.scale(role).cap}"))
    gone: set[str] = set()
    held = {machine for claim in turn.signals.training for machine in claim.machines}
    for member, reason in _ordered(turn, surplus):
        if member.token in gone or kept - 1 < max(least, need):
            continue
        if member.id in held:  # its job was told to let go of it and has not yet
            continue
        if member.stage == "ready":
            if answering - 1 < need:
                continue
            answering -= 1
        kept -= 1
        gone.add(member.token)
        lent = member.id in turn.lent  # training's own: it goes back, also if it never answered
        job = taker(turn, member) if member.stage == "ready" or lent else ""
        turn.part(member, f"{reason}; {job} pays more for it" if job else reason, job)


def _ordered(turn: Turn, surplus: list[Surplus]) -> list[tuple[Member, str]]:
    """Each entry's members in order, as many as it can do without; then all in order."""
    risks = {
        member.offer.name: at_risk(turn, member.offer)
        for entry in surplus
        for member in entry.members
        if member.stage == "ready" and member.offer.market == "spot"
    }

    def order(pair: tuple[Member, str]) -> tuple[int, bool, float, float, float]:
        member = pair[0]
        risk = risks.get(member.offer.name, 0.0)
        on_demand = member.offer.market == "on_demand" and member.stage == "ready"
        return (
            ORDER[member.stage],
            on_demand,
            -risk,
            -member.offer.usd_per_h,
            -member.launched_s,
        )

    chosen = []
    for entry in surplus:
        pairs = sorted(((member, entry.reason) for member in entry.members), key=order)
        chosen += pairs[: entry.many]
    return sorted(chosen, key=order)


def see_off(turn: Turn) -> None:
    """Machines on their way out: given back, or handed to training, once nothing runs there or
    their time is up; asked again until they are gone."""
    fresh = {act.machine for act in turn.actions if isinstance(act, Terminate)}
    held_by = {machine: claim.job for claim in turn.signals.training for machine in claim.machines}
    for machine, leaving in list(turn.leaving.items()):
        held = turn.held.get(machine)
        if held is None or (leaving.job and held_by.get(machine) == leaving.job):
            del turn.leaving[machine]
            continue
        over = (
            held.idle or held.phase in ("pending", "starting") or turn.now_s >= leaving.deadline_s
        )
        if machine in fresh:
            continue
        if over and leaving.job:
            turn.actions.append(Return(leaving.job, machine, leaving.reason))
        elif over:
            turn.actions.append(Terminate(machine, leaving.reason))
        elif held.phase == "ready":
            turn.remind(machine, leaving)
