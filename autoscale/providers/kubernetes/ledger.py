"""What was asked for, and what became of it: kept in a ConfigMap, since pods know no launch tokens
and a RayCluster loses its annotations whenever KubeRay rewrites it.

`replicas` of every group follows from the ledger, so that a crash between the two writes, a rewrite
by KubeRay and a new cluster of an upgrade are all put right by looking again.
"""

import hashlib
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from autoscale.spot.events import EventKind, SpotEvent

REMEMBERED_S = 3600.0  # how long a machine that is gone answers to its token
EVENTS, GONE = 400, 300  # most that are kept
KEY = "ledger.json"


@dataclass(frozen=True)
class Entry:
    """One launch. Times in seconds since 1970. pod: its name, "" before there is one. placed: it
    is on a node. leaving: we give it back. gone_s: when it went."""

    token: str
    group: str
    asked_s: float
    pod: str = ""
    placed: bool = False
    ready_s: float | None = None
    doomed_s: float | None = None
    leaving: bool = False
    gone_s: float | None = None

    @property
    def id(self) -> str:
        """The machine's: the same for the same token, always."""
        return id_of(self.token)


@dataclass(frozen=True)
class Ledger:
    """cluster: the RayCluster that the pods are of. events: the last ones; dropped: how many came
    before them, so that cursors stay what they were."""

    cluster: str = ""
    entries: tuple[Entry, ...] = ()
    events: tuple[SpotEvent, ...] = ()
    dropped: int = 0

    def find(self, machine_id: str) -> Entry | None:
        """By machine."""
        return next((entry for entry in self.entries if entry.id == machine_id), None)

    def held(self, group: str) -> tuple[Entry, ...]:
        """What is paid for, of one group."""
        return tuple(e for e in self.entries if e.group == group and e.gone_s is None)

    def put(self, entry: Entry) -> "Ledger":
        """With this entry in the place of the one of its token, or at the end."""
        others = [entry if e.token == entry.token else e for e in self.entries]
        if entry not in others:
            others.append(entry)
        return replace(self, entries=tuple(others))

    def without(self, token: str) -> "Ledger":
        """As if it had never been asked for."""
        return replace(self, entries=tuple(e for e in self.entries if e.token != token))

    def tell(self, at_s: float, pool: str, kind: EventKind, value: float) -> "Ledger":
        """With one event more."""
        return replace(self, events=(*self.events, SpotEvent(at_s, pool, kind, float(value))))

    def pruned(self, now_s: float) -> "Ledger":
        """Without what nobody can ask about any more."""
        gone = [e for e in self.entries if e.gone_s is not None]
        gone.sort(key=lambda e: e.gone_s or 0.0)
        old = {e.token for e in gone if now_s - (e.gone_s or 0.0) > REMEMBERED_S}
        old |= {e.token for e in gone[: max(0, len(gone) - GONE)]}
        over = max(0, len(self.events) - EVENTS)
        entries = tuple(e for e in self.entries if e.token not in old)
        return replace(
            self, entries=entries, events=self.events[over:], dropped=self.dropped + over
        )


@dataclass(frozen=True)
class Stored:
    """A ledger as it was read. version: its ConfigMap's, "" where there is none yet."""

    ledger: Ledger = field(default_factory=Ledger)
    version: str = ""


_LEDGER: TypeAdapter[Ledger] = TypeAdapter(Ledger)


def written(ledger: Ledger) -> str:
    """As text."""
    return _LEDGER.dump_json(ledger, exclude_defaults=True).decode()


def read(text: str, where: str) -> Ledger:
    """ValueError where it is none of ours: machines would be forgotten."""
    try:
        return _LEDGER.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{where} holds no ledger of machines: {error}") from None


def id_of(token: str) -> str:
    """The machine that answers to a token."""
    return "m-" + hashlib.sha256(token.encode()).hexdigest()[:12]
