"""One step under way: the signals, what was remembered, and what has been decided so far.

Made at the beginning of a step and thrown away at its end; nothing outside a step sees one change.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from autoscale.catalog.offer import Offer
from autoscale.loop.actions import Action, Drain, Launch, Terminate, Warn
from autoscale.loop.signals import Held, Signals
from autoscale.loop.state import Asked, Leaving, LoopState
from cluster.settings.autoscale import AutoscaleSettings, RoleScale

Stage = Literal["asked", "pending", "starting", "ready"]
TRAINING = "train/"


@dataclass(frozen=True)
class Member:
    """A machine that counts for a role: neither leaving nor doomed. id: "" while it was only asked
    for."""

    id: str
    token: str
    offer: Offer
    stage: Stage
    launched_s: float


class Turn:
    """The working copy. What starts with a name of `LoopState` becomes the next state."""

    def __init__(self, settings: AutoscaleSettings, name: str, state: LoopState, signals: Signals):
        self.settings, self.name, self.signals = settings, name, signals
        self.now_s = signals.now_s
        self.memory = copy.deepcopy(state.memory)
        self.tokens = state.tokens
        self.minds = dict(state.minds)
        self.asked = list(state.asked)
        self.shut = dict(state.shut)
        self.leaving = dict(state.leaving)
        self.present, self.doomed = state.present, state.doomed
        self.lent = dict(state.lent)
        self.short = dict(state.short)
        self.warned = dict(state.warned)
        self.offers = {**state.offers, **{offer.name: offer for offer in signals.offers}}
        self.actions: list[Action] = []
        self.trouble: dict[str, str] = {}  # role -> why something it wanted was not had
        self.held = {machine.id: machine for machine in signals.machines}
        self._by_role: dict[str, list[Member]] = {}  # forgotten whenever something changes
        self._bought = Counter(machine.offer for machine in signals.machines)

    def scale(self, role: str) -> RoleScale:
        found: RoleScale = getattr(self.settings, role)
        return found

    def role_of(self, machine: Held) -> str:
        return self.lent.get(machine.id, machine.role) if self.lent else machine.role

    def serves(self, machine: Held) -> bool:
        """It is a machine of one of our roles: not training's, and not a stranger."""
        role = self.role_of(machine)
        return bool(role) and not role.startswith(TRAINING)

    def offer(self, name: str) -> Offer:
        """As it is or was on sale. One that never was stands for a machine that is never bought."""
        known = self.offers.get(name)
        return known or Offer(name, "", 1, "", "", "on_demand", 0.0)

    def members(self, role: str) -> list[Member]:
        """In the order of their launches, those only asked for last."""
        if role not in self._by_role:
            self._by_role[role] = self._members(role)
        return self._by_role[role]

    def changed(self) -> None:
        """Members have come or gone."""
        self._by_role.clear()

    def _members(self, role: str) -> list[Member]:
        there = [
            Member(
                machine.id,
                machine.token,
                self.offer(machine.offer),
                machine.phase,
                machine.launched_s,
            )
            for machine in self.signals.machines
            if self.role_of(machine) == role
            and machine.id not in self.leaving
            and machine.doomed_s is None
            and machine.phase != "draining"
        ]
        return there + [
            Member("", one.token, self.offer(one.offer), "asked", one.since_s)
            for one in self.asked
            if one.role == role
        ]

    def ready(self, role: str) -> int:
        return sum(member.stage == "ready" for member in self.members(role))

    def bought(self, offer: str) -> int:
        """Machines of an offer that are held, on their way out, or asked for."""
        return self._bought[offer] + sum(one.offer == offer for one in self.asked)

    def is_open(self, offer: Offer) -> bool:
        """It may be asked for now: not shut, and within its quota."""
        shut = self.shut.get(offer.name)
        below = offer.quota is None or self.bought(offer.name) < offer.quota
        return below and (shut is None or shut.until_s <= self.now_s)

    def launch(self, role: str, offer: Offer, reason: str) -> None:
        self.tokens += 1
        token = f"{role}/{self.name}/{self.tokens}"
        self.asked.append(Asked(token, offer.name, role, self.now_s, reason))
        if role in self._by_role:
            member = Member("", token, offer, "asked", self.now_s)
            self._by_role[role] = [*self._by_role[role], member]
        self.actions.append(Launch(offer.name, role, token, reason))

    def part(self, member: Member, reason: str, job: str = "") -> None:
        """Send a member away: what was only asked for is forgotten, what does not answer yet is
        given back, what does is drained first."""
        if member.stage == "asked":
            self.changed()
            self.asked = [one for one in self.asked if one.token != member.token]
            self.actions = [
                act
                for act in self.actions
                if not (isinstance(act, Launch) and act.token == member.token)
            ]
            return
        now = member.stage in ("pending", "starting") and not job
        deadline_s = self.now_s if now else self.now_s + self.settings.drain_s
        self.leave(member.id, deadline_s, reason, job)

    def leave(self, machine: str, deadline_s: float, reason: str, job: str = "") -> None:
        self.leaving[machine] = Leaving(deadline_s, reason, job)
        self.lent.pop(machine, None)
        self.changed()
        if deadline_s <= self.now_s:
            self.actions.append(Terminate(machine, reason))
        elif self.held[machine].phase != "draining":
            self.actions.append(Drain(machine, deadline_s, reason))

    def remind(self, machine: str, leaving: Leaving) -> None:
        """A drain that was asked for and that the replica has not heard of."""
        drained = any(isinstance(act, Drain) and act.machine == machine for act in self.actions)
        if not drained:
            self.actions.append(Drain(machine, leaving.deadline_s, leaving.reason))

    def warn(self, about: str, reason: str) -> None:
        """Once in `give_up_s` about each thing."""
        last_s = self.warned.get(about)
        if last_s is None or self.now_s - last_s >= self.settings.give_up_s:
            self.warned[about] = self.now_s
            self.actions.append(Warn(about, reason))
