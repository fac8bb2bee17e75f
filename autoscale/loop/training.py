"""Training beside serving: it gives machines up while serving is short, at the price that it names,
and gets those back that serving can do without, if they are worth their price to it."""

from autoscale.loop.actions import Yield
from autoscale.loop.signals import TrainingClaim
from autoscale.loop.turn import Member, Turn


def repeat(turn: Turn) -> None:
    """What a job was told to give up and still holds, it is told again."""
    for claim in turn.signals.training:
        for machine in claim.machines:
            if machine in turn.lent:
                role = turn.lent[machine]
                turn.actions.append(Yield(claim.job, machine, role, "it still holds it"))


def take(turn: Turn, role: str) -> None:
    """While fewer than needed are there or on their way: the job whose loss is least gives one up,
    if that costs no more than being short until a bought machine could answer."""
    lacking = turn.minds[role].need - len(turn.members(role))
    starts_s = min((offer.startup_s for offer in turn.signals.offers), default=0.0)
    short_s = turn.now_s - turn.short.get(role, turn.now_s)
    worth_usd = turn.settings.short_usd_per_h * max(starts_s, short_s) / 3600
    for _ in range(lacking):
        if len(turn.members(role)) >= turn.scale(role).cap:
            return
        givers = [claim for claim in turn.signals.training if _left(turn, claim)]
        giver = min(givers, key=lambda claim: (claim.shrink_usd, claim.job), default=None)
        if giver is None or giver.shrink_usd > worth_usd:
            return
        machine = _left(turn, giver)[-1]
        turn.lent[machine] = role
        turn.changed()
        reason = (
            f"{role} lacks {lacking}: ${giver.shrink_usd:.2f} is no more than the "
            f"${worth_usd:.2f} of waiting for a new machine"
        )
        turn.actions.append(Yield(giver.job, machine, role, reason))


def _left(turn: Turn, claim: TrainingClaim) -> list[str]:
    """Machines that the job still holds and could go without."""
    mine = [m for m in claim.machines if m not in turn.lent and _sound(turn, m)]
    return mine[claim.least :]


def _sound(turn: Turn, machine: str) -> bool:
    held = turn.held.get(machine)
    return held is not None and held.doomed_s is None and machine not in turn.leaving


def taker(turn: Turn, member: Member) -> str:
    """The job that gets a machine which serving can do without: of those that could use one more
    and to which it is worth its price, the one to which it is worth most. "" if there is none."""
    price = member.offer.usd_per_h

    def could(claim: TrainingClaim) -> bool:
        coming = sum(leaving.job == claim.job for leaving in turn.leaving.values())
        return len(claim.machines) + coming < claim.wanted and claim.value_usd_per_h >= price

    able = [claim for claim in turn.signals.training if could(claim)]
    best = max(able, key=lambda claim: (claim.value_usd_per_h, claim.job), default=None)
    return best.job if best else ""
