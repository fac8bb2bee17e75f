"""What the loop asks for, each with its reason. Executing one twice does no more than once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Launch:
    """One machine of an offer. The same token again is the same machine: a lost answer costs
    nothing."""

    offer: str
    role: str
    token: str
    reason: str
    act: Literal["launch"] = "launch"


@dataclass(frozen=True, slots=True)
class Serve:
    """The machines of a role that are to have a replica, from now on exactly these (draining ones
    are not among them, and end in peace)."""

    role: str
    machines: tuple[str, ...]
    reason: str
    act: Literal["serve"] = "serve"


@dataclass(frozen=True, slots=True)
class Drain:
    """No new work for the machine; what runs there ends or is moved by deadline_s."""

    machine: str
    deadline_s: float
    reason: str
    act: Literal["drain"] = "drain"


@dataclass(frozen=True, slots=True)
class Terminate:
    """Give the machine back now."""

    machine: str
    reason: str
    act: Literal["terminate"] = "terminate"


@dataclass(frozen=True, slots=True)
class Yield:
    """A training job gives the machine to a role."""

    job: str
    machine: str
    role: str
    reason: str
    act: Literal["yield"] = "yield"


@dataclass(frozen=True, slots=True)
class Return:
    """A training job gets the machine, which serves no more and is drained."""

    job: str
    machine: str
    reason: str
    act: Literal["return"] = "return"


@dataclass(frozen=True, slots=True)
class Warn:
    """Something that a person should know: what is asked for cannot be had."""

    about: str
    reason: str
    act: Literal["warn"] = "warn"


Action = Launch | Serve | Drain | Terminate | Yield | Return | Warn


@dataclass(frozen=True, slots=True)
class RoleNeed:
    """How many replicas of a role must answer, and why. tokens_per_s: what arrives now;
    forecast_tokens_per_s: what is reckoned with; replica_tokens_per_s: what one replica serves."""

    need: int
    tokens_per_s: float
    forecast_tokens_per_s: float
    replica_tokens_per_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One step's output. number: counts steps from 1."""

    number: int
    now_s: float
    needs: Mapping[str, RoleNeed]
    actions: tuple[Action, ...]
