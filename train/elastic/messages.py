"""What the supervisor and its workers say to each other: one JSON object for each message.

Nothing here is code or pickled, so a message cannot do more than it says. A generation is one set
of workers from its `Plan` to its end; messages about an older one are void.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(_Message):
    """State after `step` steps and `samples` samples, cut into `shards` equal shares (1: whole)."""

    step: int
    samples: int
    shards: int


class Held(_Message):
    """One share of one version, complete in a worker's memory."""

    version: Version
    index: int


class Finished(_Message):
    """Rank 0 (or, in `Idle.last`, any rank) ended a step. loss: of the global batch."""

    kind: Literal["finished"] = "finished"
    generation: int
    step: int
    samples: int
    loss: float
    step_s: float


class Hello(_Message):
    """A worker's first message."""

    kind: Literal["hello"] = "hello"
    worker: str
    pid: int
    machine: str = ""


class Beat(_Message):
    """A worker's process runs, whatever it computes."""

    kind: Literal["beat"] = "beat"


class Idle(_Message):
    """A worker is in no group and waits for a plan.

    reason: new (just started), paused (as asked, between two steps), changed (a collective failed),
    gave (its shares are with others), done (the last step is finished).
    host, port: of a fresh TCPStore for the next generation, in case this worker becomes rank 0.
    """

    kind: Literal["idle"] = "idle"
    generation: int
    reason: Literal["new", "paused", "changed", "gave", "done"]
    held: tuple[Held, ...]
    host: str
    port: int
    detail: str = ""
    last: Finished | None = None


class Resumed(_Message):
    """A worker has the plan's state. Bytes by where they came from; lost: what no memory had."""

    kind: Literal["resumed"] = "resumed"
    generation: int
    rank: int
    step: int
    local_bytes: int
    peer_bytes: int
    store_bytes: int
    lost: tuple[str, ...] = ()


class Failed(_Message):
    """The job cannot go on: not a lost peer, but an error of the job itself."""

    kind: Literal["failed"] = "failed"
    detail: str


class Plan(_Message):
    """The next generation. ranks: workers in rank order. givers: workers that only hand over what
    they hold. version: which state to go on from, None for the store's. holders: for each share of
    it, the positions in ranks + givers that hold it."""

    kind: Literal["plan"] = "plan"
    generation: int
    ranks: tuple[str, ...]
    givers: tuple[str, ...] = ()
    host: str
    port: int
    version: Version | None
    holders: tuple[tuple[int, ...], ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def everyone(self) -> tuple[str, ...]:
        """All who meet to hand state over, by their rank there."""
        return self.ranks + self.givers


class Fence(_Message):
    """The generation ends: after the step under way (soft), or at once, abandoning it (hard)."""

    kind: Literal["fence"] = "fence"
    generation: int
    hard: bool


class Leave(_Message):
    """End the process; nothing of this worker is needed any more."""

    kind: Literal["leave"] = "leave"


FromWorker = Hello | Beat | Idle | Finished | Resumed | Failed
ToWorker = Plan | Fence | Leave
_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(
    Annotated[FromWorker, Field(discriminator="kind")]
)
_TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])


def encode(message: FromWorker | ToWorker) -> bytes:
    """One message as JSON."""
    return message.model_dump_json().encode()


def from_worker(data: bytes) -> FromWorker:
    """ValueError for anything that is no worker's message."""
    return _FROM_WORKER.validate_json(data)


def to_worker(data: bytes) -> ToWorker:
    """ValueError for anything that is no supervisor's message."""
    return _TO_WORKER.validate_json(data)
