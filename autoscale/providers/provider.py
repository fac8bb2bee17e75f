"""The contract between the autoscaler and whatever rents out machines.

Every provider passes tests/autoscale/providers/suite.py. This file imports no Ray and no cloud; the
folders beside it may.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from autoscale.catalog.offer import Offer
from autoscale.spot.events import SpotEvent

MachineState = Literal["pending", "running", "draining", "gone"]
Refusal = Literal["capacity", "quota", "throttled", "invalid"]


@dataclass(frozen=True)
class Machine:
    """A machine that exists and is paid for, or that lately was.

    pending: asked for, not usable yet. running: usable. draining: usable, but its provider takes it
    back at `doomed_s`. gone: no more, and no more paid for; it may drop out of the listing later.
    launched_s, ready_s, doomed_s: seconds on the provider's clock; None where not so (yet).
    doomed_s is set as soon as a notice is known, also while the machine is pending.
    token: the launch that it answers to.
    """

    id: str
    offer: str
    state: MachineState
    launched_s: float
    ready_s: float | None
    doomed_s: float | None
    token: str


class LaunchRefused(Exception):
    """The provider answered, and the answer is no; nothing was made and nothing is paid for.

    retry_s: how soon asking again may make sense, infinite where it never does.
    """

    def __init__(self, kind: Refusal, retry_s: float, message: str) -> None:
        super().__init__(message)
        self.kind: Refusal = kind
        self.retry_s = retry_s


class Provider(Protocol):
    """Any call may raise any other exception, or never return: then its effect is unknown, and the
    caller asks again. That is safe, since launch and terminate are idempotent."""

    async def offers(self) -> Sequence[Offer]:
        """What can be asked for now, at today's prices."""
        ...

    async def launch(self, offer: Offer, token: str) -> Machine:
        """The machine of this token: made now, or made by an earlier call (whose answer may have
        been lost), in whatever state it is by now. LaunchRefused; a refused token may be asked
        again. ValueError when the token already stands for a machine of another offer."""
        ...

    async def terminate(self, machine_id: str) -> None:
        """On return it is gone, or going without further cost. An unknown or gone id is success,
        and a machine may be given back at any time: pending, or with a notice pending."""
        ...

    async def machines(self) -> Sequence[Machine]:
        """Every machine that this provider holds for us, whoever asked for it and whether or not
        they heard the answer: after a crash of the caller nothing that costs money is missing."""
        ...

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        """What happened since `cursor` (0: since the beginning), and the next cursor.

        The same cursor is answered with the same events again, and perhaps more behind them: each
        is told once per cursor, and none is missed by a caller that crashes before it has noted the
        next one.
        """
        ...
