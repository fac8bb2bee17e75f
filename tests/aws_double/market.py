"""What moto does not have: time, room, prices, placement scores, and machines that are taken away.

Time is the test's; what is due is done when the next request comes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import InstanceState, StateReason
from moto.events.models import events_backends
from moto.sqs.models import sqs_backends

REGION = "us-east-1"
GPU_USD = {"g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g6.xlarge": 0.805}
GPU_USD |= {"g4dn.xlarge": 0.526, "g5.12xlarge": 5.672, "p5.48xlarge": 98.32}
Message = Literal["interruption", "rebalance"]
TOLD = {
    "interruption": "EC2 Spot Instance Interruption Warning",
    "rebalance": "EC2 Instance Rebalance Recommendation",
}


class Step(NamedTuple):
    """From at_s on, a zone has room for so many spot machines."""

    at_s: float
    zone: str
    machines: int


def event_of(message: Message, instance_id: str, at_s: float) -> Any:
    """As EC2 sends it."""
    return {
        "version": "0",
        "id": f"{instance_id}-{message}",
        "detail-type": TOLD[message],
        "source": "aws.ec2",
        "account": DEFAULT_ACCOUNT_ID,
        "time": datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": REGION,
        "resources": [f"arn:aws:ec2:us-east-1a:instance/{instance_id}"],
        "detail": {"instance-id": instance_id, "instance-action": "terminate"},
    }


@dataclass
class Market:
    """wall: the calendar. spot: $/h of (type, zone) by time; others cost 0.4 of on demand. room:
    how much a pool has, for the choice among several. refuse: (type, zone, market) -> the code of
    its refusal. lag_s: how long a new machine is not listed. dooms: id -> when it goes."""

    wall: Callable[[], float]
    startup_s: float = 60.0
    notice_s: float = 120.0
    spot: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    room: dict[tuple[str, str], int] = field(default_factory=dict)
    scores: dict[str, int] = field(default_factory=dict)
    refuse: dict[tuple[str, str, str], str] = field(default_factory=dict)
    lag_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    dooms: dict[str, float] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)  # id -> when

    @property
    def backend(self) -> Any:
        return ec2_backends[DEFAULT_ACCOUNT_ID][REGION]

    def instances(self) -> list[Any]:
        return [one for held in self.backend.all_reservations() for one in held.instances]

    def alive(self, zone: str | None = None) -> list[Any]:
        """Spot machines of a zone that exist, or all that exist."""
        return [
            one
            for one in self.instances()
            if one.state in ("pending", "running")
            and (zone is None or (one.lifecycle == "spot" and one.placement.zone == zone))
        ]

    def born(self, instance_id: str) -> None:
        """A machine as it is right after its launch."""
        instance, now_s = self.backend.get_instance(instance_id), self.wall()
        self.made[instance_id] = now_s
        instance.launch_time = datetime.fromtimestamp(now_s, UTC).replace(tzinfo=None)
        instance._state = InstanceState("pending", 0)

    def ended(self, instance: Any, code: str) -> None:
        """A machine that has gone, and why, in this calendar."""
        at = datetime.fromtimestamp(self.wall(), UTC).strftime("%Y-%m-%d %H:%M:%S GMT")
        instance._reason = f"{code} ({at})"
        instance.state_reason = StateReason(f"{code}: says the double", code)

    def take(self, instance_id: str) -> None:
        """Take a spot machine, with or without a notice."""
        instance = self.backend.get_instance(instance_id)
        instance.terminate()
        self.ended(instance, "Server.SpotInstanceTermination")

    def interrupt(self, instance_id: str) -> None:
        """Give notice; the machine goes when it is over."""
        self.dooms[instance_id] = self.wall() + self.notice_s
        self.publish("interruption", instance_id, self.wall())

    def publish(self, message: Message, instance_id: str, at_s: float) -> None:
        """Over EventBridge, into the queues of the rules that it matches."""
        event = event_of(message, instance_id, at_s)
        bus = events_backends[DEFAULT_ACCOUNT_ID][REGION].event_buses["default"]
        for rule in bus.rules.values():
            for target in rule.targets if rule.event_pattern.matches_event(event) else ():
                queue = target["Arn"].rpartition(":")[2]
                sqs = sqs_backends[DEFAULT_ACCOUNT_ID][REGION]
                sqs.send_message(queue, json.dumps(event))

    def usd_per_h(self, instance_type: str, zone: str, at_s: float | None = None) -> float:
        history = self.spot.get((instance_type, zone), [])
        at_s = self.wall() if at_s is None else at_s
        past = [usd for since_s, usd in history if since_s <= at_s]
        return past[-1] if past else round(0.4 * GPU_USD[instance_type], 4)

    def has_room(self, zone: str) -> bool:
        past = [step for step in self._steps(zone) if step.at_s <= self.wall()]
        return not past or len(self.alive(zone)) < past[-1].machines

    def _steps(self, zone: str) -> list[Step]:
        """In the order of their times; of those of one time the last one holds."""
        of_zone = {step.at_s: step for step in self.steps if step.zone == zone}
        return sorted(of_zone.values())

    def tick(self) -> None:
        """All that is due by now."""
        now_s = self.wall()
        for name, at_s in self.made.items():
            instance = self.backend.get_instance(name)
            if instance.state == "pending" and now_s >= at_s + self.startup_s:
                instance._state = InstanceState("running", 16)
        for zone in {step.zone for step in self.steps}:
            for step in self._steps(zone):
                if step.at_s - self.notice_s <= now_s:
                    self._make_room(step)
        for name, at_s in list(self.dooms.items()):
            if at_s <= now_s:
                del self.dooms[name]
                if self.backend.get_instance(name).state in ("pending", "running"):
                    self.take(name)

    def _make_room(self, step: Step) -> None:
        later = [s for s in self._steps(step.zone) if step.at_s < s.at_s <= self.wall()]
        alive = [one.id for one in self.alive(step.zone) if one.id not in self.dooms]
        for name in [] if later else sorted(alive)[: len(alive) - step.machines]:
            self.dooms[name] = max(step.at_s, self.wall())
            self.publish("interruption", name, self.dooms[name] - self.notice_s)
