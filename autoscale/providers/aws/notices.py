"""Notices: EC2 takes a machine in two minutes, or holds it likely that it will.

They come over EventBridge into an SQS queue, in any order and more than once, and on the machine
itself by IMDSv2 (imds.py). Formats: "Spot Instance interruption notices" and "EC2 instance
rebalance recommendations" of the EC2 user guide.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoscale.providers.aws import marks
from autoscale.providers.aws.calls import Calls

LOG = logging.getLogger(__name__)
NOTICE_S = 120.0  # from the warning until the machine is taken
INTERRUPTION = "EC2 Spot Instance Interruption Warning"
REBALANCE = "EC2 Instance Rebalance Recommendation"
AT_ONCE, MOST_BATCHES = 10, 20


@dataclass(frozen=True)
class Notice:
    """at_s: the calendar time at which EC2 takes the machine (interruption), or since when it holds
    that likely (rebalance)."""

    instance: str
    kind: Literal["interruption", "rebalance"]
    at_s: float

    @property
    def tag(self) -> str:
        return marks.DOOMED if self.kind == "interruption" else marks.REBALANCE


def parse(body: str, notice_s: float = NOTICE_S) -> Notice | None:
    """Of an event as EventBridge delivers it; None for one of another kind. ValueError for what is
    no event."""
    try:
        event = json.loads(body)
        kind, at_s = event["detail-type"], marks.read(event["time"])
        instance = event["detail"].get("instance-id", "")
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"no event of EventBridge: {body[:200]!r}") from error
    if kind == INTERRUPTION and instance:
        return Notice(instance, "interruption", at_s + notice_s)
    if kind == REBALANCE and instance:
        return Notice(instance, "rebalance", at_s)
    return None


@dataclass(frozen=True)
class Letter:
    """A message of the queue, and the notice in it; None where it is about something else."""

    receipt: str
    notice: Notice | None


@dataclass(frozen=True)
class Queue:
    """url: of the SQS queue; "" for none."""

    calls: Calls
    url: str
    notice_s: float = NOTICE_S

    async def receive(self) -> list[Letter]:
        """What waits. What is not burned comes again when the queue's visibility timeout ends."""
        letters: dict[str, Letter] = {}
        for _ in range(MOST_BATCHES if self.url else 0):
            answer = await self.calls.one(
                "sqs", "receive_message", QueueUrl=self.url, MaxNumberOfMessages=AT_ONCE
            )
            found = answer.get("Messages", ())
            fresh = [message for message in found if message["MessageId"] not in letters]
            letters |= {message["MessageId"]: self._letter(message) for message in found}
            if not fresh:
                break
        return list(letters.values())

    async def burn(self, letters: Sequence[Letter]) -> None:
        """Never hear of these again."""
        for start in range(0, len(letters), AT_ONCE):
            part = letters[start : start + AT_ONCE]
            entries = [{"Id": f"{n}", "ReceiptHandle": one.receipt} for n, one in enumerate(part)]
            await self.calls.one("sqs", "delete_message_batch", QueueUrl=self.url, Entries=entries)

    def _letter(self, message: dict[str, Any]) -> Letter:
        try:
            notice = parse(message["Body"], self.notice_s)
        except ValueError as error:
            LOG.warning("a message that nobody can read is thrown away: %s", error)
            notice = None
        return Letter(message["ReceiptHandle"], notice)
