"""Leases on pages lent from a prefill replica, or one that drains, to a decode replica.

A lease ends by the receiver's acknowledgement, by an abort, or by time; whichever comes first frees
the pages, and any later end is a no-op. The sender owns the table; `sweep` is called by its own
clock, since a receiver that was killed says nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.clock import Clock


@dataclass(frozen=True)
class Lease:
    """Pages lent until `expires_s`; `request_id` finds it when the request is aborted.

    free: gives the pages back, once.
    """

    lease_id: str
    request_id: str
    expires_s: float
    free: Callable[[], object]


@dataclass
class LeaseCounts:
    """How leases ended, since start."""

    granted: int = 0
    acknowledged: int = 0
    aborted: int = 0
    expired: int = 0


@dataclass
class LeaseTable:
    """All leases of one sender; used on the thread that owns the pages."""

    clock: Clock
    lease_s: float
    counts: LeaseCounts = field(default_factory=LeaseCounts)
    _leases: dict[str, Lease] = field(default_factory=dict)

    def grant(
        self,
        lease_id: str,
        request_id: str,
        free: Callable[[], object],
        lease_s: float | None = None,
    ) -> Lease:
        """Lend what `free` gives back when the lease ends; None: after the table's own time."""
        assert lease_id not in self._leases, lease_id
        left_s = self.lease_s if lease_s is None else lease_s
        lease = Lease(lease_id, request_id, self.clock.now_s() + left_s, free)
        self._leases[lease_id] = lease
        self.counts.granted += 1
        return lease

    def acknowledge(self, lease_id: str) -> bool:
        """The receiver has its copy: free the pages. False when the lease had ended already."""
        ended = self._end(lease_id)
        self.counts.acknowledged += ended
        return ended

    def abort(self, request_id: str) -> int:
        """End every lease of a request; returns how many there were."""
        return self._end_all(lambda lease: lease.request_id == request_id, "aborted")

    def sweep(self) -> int:
        """End every lease whose time is up; returns how many there were."""
        now_s = self.clock.now_s()
        return self._end_all(lambda lease: lease.expires_s <= now_s, "expired")

    def holds(self, lease_id: str) -> bool:
        """Whether the lease has not ended yet."""
        return lease_id in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    def _end_all(self, chosen: Callable[[Lease], bool], kind: str) -> int:
        ids = [lease.lease_id for lease in self._leases.values() if chosen(lease)]
        ended = sum(self._end(lease_id) for lease_id in ids)
        setattr(self.counts, kind, getattr(self.counts, kind) + ended)
        return ended

    def _end(self, lease_id: str) -> bool:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            lease.free()
        return lease is not None
