"""An EC2 instance as DescribeInstances shows it, reduced to what a machine of ours is."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoscale.providers.aws import marks

BY_OUR_HAND = ("Client.UserInitiatedShutdown", "Client.UserInitiatedHibernate")
ENDING = ("shutting-down", "terminated")
STOPPED = ("stopping", "stopped")


@dataclass(frozen=True)
class Instance:
    """launched_s, ended_s: calendar times. reason: the code of why it ended. times: what its tags
    say of its end (marks.DOOMED, marks.REBALANCE)."""

    id: str
    state: str
    offer: str
    token: str
    launched_s: float
    type: str = ""
    zone: str = ""
    spot: bool = False
    reason: str = ""
    ended_s: float | None = None
    times: Mapping[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """It exists, and costs or is about to."""
        return self.state not in ENDING

    @property
    def lost(self) -> bool:
        """It ended, and not by a call of ours."""
        return not self.held and self.reason not in BY_OUR_HAND


def read(reservations: Iterable[Mapping[str, Any]]) -> Iterator[Instance]:
    """Instances of DescribeInstances' answer, in its order."""
    for reservation in reservations:
        for row in reservation.get("Instances", ()):
            yield _instance(row)


def _instance(row: Mapping[str, Any]) -> Instance:
    tags = {tag["Key"]: tag["Value"] for tag in row.get("Tags", ())}
    return Instance(
        row["InstanceId"],
        row["State"]["Name"],
        tags.get(marks.OFFER, ""),
        tags.get(marks.TOKEN, ""),
        row["LaunchTime"].timestamp(),
        row.get("InstanceType", ""),
        row.get("Placement", {}).get("AvailabilityZone", ""),
        row.get("InstanceLifecycle") == "spot",
        row.get("StateReason", {}).get("Code", ""),
        _ended_s(row.get("StateTransitionReason", "")),
        marks.times(tags),
    )


def _ended_s(reason: str) -> float | None:
    """Of "User initiated (2026-01-01 00:00:00 GMT)": the time; None where there is none."""
    found = re.search(r"\((\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d) (?:GMT|UTC)\)", reason)
    return marks.read(f"{found[1]}T{found[2]}+00:00") if found else None
