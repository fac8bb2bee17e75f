"""What goes wrong with an API server, told beforehand: each fault is taken by the next request that
it fits."""

import threading
from dataclasses import dataclass, field
from typing import Literal

from tests.kubernetes_double.kinds import ApiError
from tests.kubernetes_double.rbac import Attempt

Kind = Literal["409", "410", "429", "500", "503", "no answer", "lost answer"]
REASONS = {
    "409": ("Conflict", "the object has been modified; please try again"),
    "410": ("Expired", "The provided continue parameter is too old"),
    "429": ("TooManyRequests", "too many requests; try again later"),
    "500": ("InternalError", "an error on the server (etcdserver: leader changed)"),
    "503": ("ServiceUnavailable", "the server is currently unable to handle the request"),
}


@dataclass
class Fault:
    """no answer: the connection ends before anything is done. lost answer: it ends after."""

    kind: Kind
    verb: str
    resource: str
    times: int
    user: str | None = None

    def fits(self, attempt: Attempt) -> bool:
        """Whether it is for this request."""
        mine = self.user in (None, attempt.user)
        return mine and (self.verb, self.resource) == (attempt.verb, attempt.resource)


@dataclass
class Faults:
    """due: taken in their order. taken: those that struck. frozen: watches tell nothing, though
    their connections stay (a stale watch cache). epoch: watches begun in an earlier one end."""

    due: list[Fault] = field(default_factory=list)
    taken: list[tuple[str, Attempt]] = field(default_factory=list)
    frozen: bool = False
    epoch: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, kind: Kind, verb: str, resource: str, times: int = 1, user: str | None = None
    ) -> None:
        """The next `times` such requests fail so."""
        with self._lock:
            self.due.append(Fault(kind, verb, resource, times, user))

    def drop_watches(self) -> None:
        """Every open watch ends, in the middle of its stream."""
        self.epoch += 1

    def take(self, attempt: Attempt) -> Kind | None:
        """The fault that strikes this request."""
        with self._lock:
            for fault in self.due:
                if fault.fits(attempt):
                    fault.times -= 1
                    if not fault.times:
                        self.due.remove(fault)
                    self.taken.append((fault.kind, attempt))
                    return fault.kind
        return None


def answer(kind: Kind) -> ApiError:
    """The server's words for a fault that is an answer."""
    reason, said = REASONS[kind]
    retry_s = 1 if kind == "429" else None
    return ApiError(int(kind), reason, said, retry_after_s=retry_s)
