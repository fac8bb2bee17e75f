"""What became of what was asked for, and what the market did: the first part of a step."""

import math

from autoscale.loop.actions import Launch
from autoscale.loop.signals import Answer
from autoscale.loop.state import Asked, Shut
from autoscale.loop.turn import Turn
from autoscale.spot.belief import SpotRisk
from autoscale.spot.events import EventKind, SpotEvent

MOST_DOUBLINGS = 6


def hear(turn: Turn) -> None:
    """Answers, losses and what is held, into the memory; asks that are settled, let go, or made
    again."""
    before = {one.token: one for one in turn.asked}
    answers = {answer.token: answer for answer in turn.signals.answers}
    _observe(turn, [answer for answer in turn.signals.answers if answer.token in before])
    seen = {machine.token for machine in turn.signals.machines}
    turn.asked = []
    for one in before.values():
        if one.token not in seen:
            _settle(turn, one, answers.get(one.token))
    turn.changed()
    _let_go(turn)
    for machine in turn.signals.machines:
        if not turn.role_of(machine):
            turn.warn(machine.id, "a machine that is paid for and that nobody here asked for")


def _observe(turn: Turn, answers: list[Answer]) -> None:
    """Everything at the time of this step: a memory hears events in the order of their times. A
    machine counts as lost when it is doomed, for that is when the market has no more."""
    counts = {offer.name: 0 for offer in turn.signals.offers if offer.market == "spot"}
    for machine in turn.signals.machines:
        if machine.phase != "pending" and machine.doomed_s is None and machine.offer in counts:
            counts[machine.offer] += 1
    for pool in sorted(_lost(turn) & counts.keys()):
        _tell(turn, pool, "preempt", counts[pool])
    for pool, count in counts.items():
        _tell(turn, pool, "held", count)
    for answer in answers:
        if answer.offer in counts and answer.kind in ("launched", "capacity"):
            kind: EventKind = "launch_ok" if answer.kind == "launched" else "launch_fail"
            _tell(turn, answer.offer, kind, counts[answer.offer])


def _lost(turn: Turn) -> set[str]:
    """Pools that have taken a machine since the last step, or said that they will."""
    before = turn.doomed
    doomed = {m.offer for m in turn.signals.machines if m.doomed_s and m.id not in before}
    gone = {
        offer
        for machine, offer in turn.present.items()
        if machine not in turn.held and machine not in turn.leaving and machine not in before
    }
    noticed = {turn.present.get(machine) for machine in before}
    told = {event.pool for event in turn.signals.events if event.kind == "preempt"}
    return doomed | gone | (told - noticed)


def _tell(turn: Turn, pool: str, kind: EventKind, value: float) -> None:
    known = not isinstance(turn.memory, SpotRisk) or pool in turn.memory.chain.pools
    if known:
        turn.memory.observe(SpotEvent(turn.now_s, pool, kind, value))


def _settle(turn: Turn, one: Asked, answer: Answer | None) -> None:
    """An ask whose machine is not to be seen."""
    kind = answer.kind if answer else "failed"
    if kind == "launched" and answer:
        turn.shut.pop(one.offer, None)
        turn.asked.append(Asked(one.token, one.offer, one.role, one.since_s, one.reason, True))
    elif kind != "failed" and answer:
        _refused(turn, one, answer)
    elif one.heard:
        pass  # it was made and is gone already
    elif turn.now_s - one.since_s >= turn.settings.give_up_s:
        waited = f"no answer for {turn.settings.give_up_s:g} s; let go"
        turn.shut[one.offer] = _shut(turn, one.offer, "failed", turn.settings.give_up_s)
        turn.warn(one.offer, waited)
    else:
        turn.asked.append(one)
        turn.actions.append(Launch(one.offer, one.role, one.token, f"no answer yet: {one.reason}"))


def _refused(turn: Turn, one: Asked, answer: Answer) -> None:
    """The offer is not asked for a while: as long as it says; for what is no matter of the market,
    longer each time."""
    times = turn.shut[one.offer].times if one.offer in turn.shut else 0
    wait_s = math.inf if answer.retry_s is None else answer.retry_s
    if answer.kind in ("quota", "throttled"):
        again_s = turn.settings.period_s * 2 ** min(times, MOST_DOUBLINGS)
        wait_s = max(wait_s, min(turn.settings.give_up_s, again_s))
    shut = _shut(turn, one.offer, answer.kind, wait_s)
    turn.trouble[one.role] = f"{one.offer} refused ({answer.kind})"
    if math.isinf(wait_s):
        turn.warn(one.offer, f"refused for good ({answer.kind})")
    elif turn.now_s - shut.since_s >= turn.settings.give_up_s:
        refused_s = turn.now_s - shut.since_s
        turn.warn(one.offer, f"refused for {refused_s:.0f} s ({answer.kind}); let go")
        shut = Shut(turn.now_s + turn.settings.give_up_s, turn.now_s, shut.times, shut.kind)
    turn.shut[one.offer] = shut


def _shut(turn: Turn, offer: str, kind: str, wait_s: float) -> Shut:
    """Counted on from the last refusal, unless that one is long past."""
    old = turn.shut.get(offer)
    if old and turn.now_s - old.until_s > turn.settings.give_up_s:
        old = None
    since_s = old.since_s if old else turn.now_s
    return Shut(turn.now_s + wait_s, since_s, (old.times if old else 0) + 1, kind)


def _let_go(turn: Turn) -> None:
    """Machines that were promised and do not come, or never answer."""
    patience_s = turn.settings.give_up_s
    for machine in turn.signals.machines:
        age_s = turn.now_s - machine.launched_s
        if machine.id in turn.leaving or not turn.serves(machine):
            continue
        if machine.phase == "pending" and age_s >= patience_s:
            reason = f"asked for {age_s:.0f} s ago and not there; let go"
            turn.shut[machine.offer] = _shut(turn, machine.offer, "pending", patience_s)
        elif (
            machine.phase == "starting"
            and age_s >= turn.offer(machine.offer).startup_s + patience_s
        ):
            reason = f"its replica has not answered in {age_s:.0f} s"
        else:
            continue
        turn.leave(machine.id, turn.now_s, reason)
        turn.warn(machine.offer, reason)
