"""What the loop remembers between two steps. Immutable: a step makes a new one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscale.catalog.offer import Offer
from autoscale.loop.need import RoleMind
from autoscale.spot.fleet import Memory


@dataclass(frozen=True)
class Asked:
    """A launch whose machine has not been seen yet. heard: its answer was that it is made."""

    token: str
    offer: str
    role: str
    since_s: float
    reason: str
    heard: bool = False


@dataclass(frozen=True)
class Shut:
    """An offer that refused: so many times in a row since since_s, and is not asked before until_s
    (infinite: never again)."""

    until_s: float
    since_s: float
    times: int
    kind: str


@dataclass(frozen=True)
class Leaving:
    """A machine on its way out. job: the training job that gets it, "" where the provider does."""

    deadline_s: float
    reason: str
    job: str = ""


@dataclass(frozen=True)
class LoopState:
    """minds: by role. shut: by offer. leaving: by machine. lent: machine -> role, of those that
    training gave. short: role -> since when too few answer. warned: about -> when last. offers: all
    that were ever on sale, for machines that outlive their offer. present: machine -> offer, of
    those that were there at the last step; doomed: of them, those that the market had claimed."""

    memory: Memory
    number: int = 0
    tokens: int = 0
    minds: Mapping[str, RoleMind] = field(default_factory=dict)
    asked: tuple[Asked, ...] = ()
    shut: Mapping[str, Shut] = field(default_factory=dict)
    leaving: Mapping[str, Leaving] = field(default_factory=dict)
    lent: Mapping[str, str] = field(default_factory=dict)
    short: Mapping[str, float] = field(default_factory=dict)
    warned: Mapping[str, float] = field(default_factory=dict)
    offers: Mapping[str, Offer] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    doomed: frozenset[str] = frozenset()
    last_s: float | None = None
