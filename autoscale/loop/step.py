"""The loop: `step` maps what was remembered and what is seen to what is remembered and done.

Pure: it reads no clock, waits for nothing and changes nothing that it was given, so that a recorded
log decides the same again, byte for byte, and simulated time is like any other.
"""

from dataclasses import dataclass
from typing import Any

from autoscale.loop import answers, buying, parting, training
from autoscale.loop.actions import Action, Decision, Serve
from autoscale.loop.need import Moment, first_mind, think, told
from autoscale.loop.signals import Signals
from autoscale.loop.state import LoopState
from autoscale.loop.turn import Turn
from autoscale.spot.fleet import Memory, SpotPolicy
from cluster.settings.autoscale import AutoscaleSettings

ROLES = ("decode", "prefill")  # the role without which nothing is answered buys first
# Drains before "serve": a replica that the new list leaves out has its deadline by then.
SEQUENCE = ("yield", "launch", "drain", "serve", "terminate", "return", "warn")
STARTUP_S = 180.0  # where nothing is on sale


@dataclass(frozen=True)
class Loop:
    """name: makes the tokens of this loop's launches its own; never the same for two loops over one
    provider."""

    settings: AutoscaleSettings
    policy: SpotPolicy[Any]
    memory: Memory
    name: str

    def start(self) -> LoopState:
        """Before the first step. Nothing needs to be known: machines tell what they are for."""
        return LoopState(self.memory)

    def step(self, state: LoopState, signals: Signals) -> tuple[LoopState, Decision]:
        """ValueError when time has not gone on since the last step."""
        if state.last_s is not None and signals.now_s <= state.last_s:
            raise ValueError(
                f"signals of {signals.now_s} s after those of {state.last_s} s; a later time is "
                "accepted"
            )
        turn = Turn(self.settings, self.name, state, signals)
        answers.hear(turn)
        training.repeat(turn)
        parting.doomed(turn)
        _adopt(turn)
        horizons = {role: _horizon_s(turn) for role in ROLES}
        for role in ROLES:
            _think(turn, role, horizons[role], state)
            _note_short(turn, role)
            training.take(turn, role)
            parting.part(turn, role, buying.buy(turn, role, self.policy))
        parting.see_off(turn)
        for role in ROLES:
            _serve(turn, role)
            _complain(turn, role)
        needs = {
            role: told(turn.minds[role], self.settings.quantile, horizons[role]) for role in ROLES
        }
        number = state.number + 1
        decision = Decision(number, signals.now_s, needs, _in_sequence(turn.actions))
        return _remembered(turn, number), decision


def _in_sequence(actions: list[Action]) -> tuple[Action, ...]:
    return tuple(sorted(actions, key=lambda action: SEQUENCE.index(action.act)))


def _adopt(turn: Turn) -> None:
    """A replica that drains and that this loop did not send away (its predecessor did) leaves."""
    for machine in turn.signals.machines:
        strange = machine.id not in turn.leaving and turn.serves(machine)
        if machine.phase == "draining" and strange:
            turn.leave(machine.id, turn.now_s + turn.settings.drain_s, "found draining")


def _horizon_s(turn: Turn) -> float:
    """Until a machine bought now answers, and the next decision."""
    starts_s = max((offer.startup_s for offer in turn.signals.offers), default=STARTUP_S)
    return starts_s + turn.settings.period_s


def _think(turn: Turn, role: str, horizon_s: float, state: LoopState) -> None:
    """The role's need. Where its load is not known it stays as it was."""
    scale = turn.scale(role)
    mind = turn.minds.get(role)
    if mind is None:
        mind = first_mind(scale, len(turn.members(role)), turn.now_s)
    load = turn.signals.load.get(role)
    if load is not None:
        since_s = mind.forecast.at_s
        if mind.forecast.level is None:
            since_s = turn.now_s - turn.settings.period_s if state.last_s is None else state.last_s
        moment = Moment(turn.now_s, since_s, turn.ready(role), horizon_s)
        mind = think(mind, load, moment, scale, turn.settings)
    turn.minds[role] = mind


def _note_short(turn: Turn, role: str) -> None:
    if turn.ready(role) >= turn.minds[role].need:
        turn.short.pop(role, None)
    else:
        turn.short.setdefault(role, turn.now_s)


def _serve(turn: Turn, role: str) -> None:
    """The role's machines that are there and stay, if the service counts on others."""
    members = turn.members(role)
    staying = {member.id for member in members if member.stage in ("starting", "ready")}
    staying |= {
        machine.id
        for machine in turn.signals.machines
        if machine.doomed_s is not None
        and machine.phase == "ready"
        and machine.id not in turn.leaving
        and turn.role_of(machine) == role
    }
    wanted = tuple(machine.id for machine in turn.signals.machines if machine.id in staying)
    counted = {
        machine.id
        for machine in turn.signals.machines
        if machine.serving and machine.role == role and machine.phase != "draining"
    }
    if set(wanted) != counted:
        come, go = len(set(wanted) - counted), len(counted - set(wanted))
        turn.actions.append(Serve(role, wanted, f"{come} more, {go} fewer than it counts on"))


def _complain(turn: Turn, role: str) -> None:
    since_s = turn.short.get(role)
    if since_s is None or turn.now_s - since_s < turn.settings.give_up_s:
        return
    why = turn.trouble.get(role, "what was bought does not answer yet")
    need, short_s = turn.minds[role].need, turn.now_s - since_s
    turn.warn(role, f"{turn.ready(role)} of {need} answer, for {short_s:.0f} s now: {why}")


def _remembered(turn: Turn, number: int) -> LoopState:
    present = turn.held.keys()
    return LoopState(
        turn.memory,
        number,
        turn.tokens,
        turn.minds,
        tuple(turn.asked),
        turn.shut,
        turn.leaving,
        {machine: role for machine, role in turn.lent.items() if machine in present},
        turn.short,
        turn.warned,
        turn.offers,
        {machine.id: machine.offer for machine in turn.signals.machines},
        frozenset(m.id for m in turn.signals.machines if m.doomed_s is not None),
        turn.now_s,
    )
