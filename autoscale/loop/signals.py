"""What the loop is told in one step: load by role, machines, what the market did, what became of
its last launches. A pure value: it becomes one line of JSON and the same value again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autoscale.catalog.offer import Offer
from autoscale.spot.events import SpotEvent

Phase = Literal["pending", "starting", "ready", "draining"]
Answered = Literal["launched", "capacity", "quota", "throttled", "invalid", "failed"]


def refuse_not_finite(value: object, *fields: float | None) -> None:
    """ValueError where a number is infinite or none at all: nothing could be decided with it."""
    if not math.isfinite(sum(filter(None, fields))):
        raise ValueError(f"{value}: a number is not finite; finite ones are accepted, or none")


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """Work of one role. arrived_tokens: since the last step, all tokens that its requests ask of
    it (for decode: prompts it computes itself, and answers as long as they are expected to get).
    queued_tokens: of them, what waits now and nobody computes yet. running: sequences computed now.
    kv_used: share of the KV pages in use, 0 to 1. ttft, tpot: of requests since the last step."""

    arrived_tokens: int
    queued_tokens: int
    running: int
    kv_used: float
    ttft_p90_s: float | None = None
    tpot_p90_s: float | None = None

    def __post_init__(self) -> None:
        refuse_not_finite(self, self.kv_used, self.ttft_p90_s, self.tpot_p90_s)


@dataclass(frozen=True, slots=True)
class Held:
    """A machine that is paid for. role: what it is for ("" where nobody knows, "train/JOB" in a
    training job's hands). phase: pending (asked for), starting (there, its replica does not answer
    yet), ready, draining (its replica takes no new work). serving: the service counts on it. idle:
    nothing runs or waits on it. doomed_s: when the market takes it."""

    id: str
    offer: str
    role: str
    phase: Phase
    launched_s: float
    ready_s: float | None
    doomed_s: float | None
    token: str
    serving: bool = False
    idle: bool = False

    def __post_init__(self) -> None:
        refuse_not_finite(self, self.launched_s, self.ready_s, self.doomed_s)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a launch that the last step asked for. failed: nobody knows, since the call
    failed or took too long. retry_s: how soon to ask again; None for never."""

    token: str
    offer: str
    kind: Answered
    retry_s: float | None = 0.0

    def __post_init__(self) -> None:
        refuse_not_finite(self, self.retry_s)


@dataclass(frozen=True, slots=True)
class TrainingClaim:
    """A training job. machines: ids that it holds. wanted: how many it could use; least: fewest it
    can run on. shrink_usd: what giving one up costs it (work lost, the time of a new layout).
    value_usd_per_h: what one machine more is worth to it."""

    job: str
    machines: tuple[str, ...]
    wanted: int
    least: int
    shrink_usd: float
    value_usd_per_h: float

    def __post_init__(self) -> None:
        refuse_not_finite(self, self.shrink_usd, self.value_usd_per_h)


@dataclass(frozen=True, slots=True)
class Signals:
    """One step's input. load: by role; a role that is absent could not be asked. events: of the
    provider since the last step; of them the loop reads losses (notices it sees on the machines,
    its launches it knows from `answers`). machines: in the order of their launches."""

    now_s: float
    load: Mapping[str, RoleLoad]
    machines: tuple[Held, ...]
    events: tuple[SpotEvent, ...]
    offers: tuple[Offer, ...]
    answers: tuple[Answer, ...] = ()
    training: tuple[TrainingClaim, ...] = ()

    def __post_init__(self) -> None:
        refuse_not_finite(self.now_s, self.now_s)
