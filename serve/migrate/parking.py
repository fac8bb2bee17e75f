"""The KV of sequences that have left, kept by the draining replica until somebody has copied it.

A parked sequence stands still: its pages belong to a lease, which ends by acknowledgement or by
time, as a prefill's hand-off does. Whoever takes the sequence over asks for the part it lacks.
Called by depart.py, and by decode.py for the replica that asks; on the engine's thread.
"""

import secrets
from dataclasses import dataclass
from hashlib import blake2b

from cluster.clock import Clock
from serve.engine.engine import Engine
from serve.engine.sequence import Parked, Sequence
from serve.handoff import LeaseTable
from serve.kv.device import Storage
from serve.migrate import codec
from serve.migrate.plan import Carried
from serve.transport import HandoffLost, Offer, Transport


@dataclass(frozen=True)
class _Lent:
    """A parked sequence and how its KV is to cross."""

    sequence: Sequence
    choice: Carried


class Parking:
    """What one replica has parked. A lease of an earlier one of the same name is unknown here."""

    def __init__(
        self, replica_id: str, storage: Storage, transport: Transport, clock: Clock
    ) -> None:
        self.replica_id = replica_id
        self.storage = storage
        self.transport = transport
        self.leases = LeaseTable(clock, 0.0)
        self._lent: dict[str, _Lent] = {}
        self._name = secrets.token_hex(4)

    def park(
        self, engine: Engine, request_id: str, choice: Carried, lease_s: float
    ) -> Parked | None:
        """Stop a sequence and keep its KV for so long; None when it has nothing to take along."""
        sequence = engine.park(request_id)
        if sequence is None:
            return None
        lease_id = f"{self.replica_id}/{self._name}/{self.leases.counts.granted}"

        def free() -> None:
            del self._lent[lease_id]
            engine.free_held(request_id)

        tokens = sequence.computed_tokens
        self.leases.grant(lease_id, request_id, free, lease_s)
        self._lent[lease_id] = _Lent(sequence, choice)
        mark = digest(sequence, tokens)
        return Parked(self.replica_id, lease_id, tokens, mark, lease_s)

    def export(self, lease_id: str, skip_tokens: int) -> Offer:
        """Offer a parked sequence's KV from `skip_tokens` on, a whole number of pages.

        HandoffLost when the lease has ended.
        """
        lent = self._lent.get(lease_id)
        if lent is None or lent.sequence.table is None:
            raise HandoffLost(f"lease {lease_id} has ended")
        size, stop = self.storage.shape.page_tokens, lent.sequence.computed_tokens
        assert skip_tokens % size == 0 and skip_tokens <= stop, (skip_tokens, stop)
        pages = lent.sequence.table.pages[skip_tokens // size : -(-stop // size)]
        if lent.choice in ("int8", "int4"):
            return codec.offer(lease_id, self.storage, pages, (skip_tokens, stop), lent.choice)
        return self.transport.offer(lease_id, self.storage, pages, skip_tokens, stop)


def digest(sequence: Sequence, tokens: int) -> str:
    """What tells the KV of a sequence's first `tokens` tokens from any other's: a hash of cache key
    and tokens."""
    ids = ",".join(map(str, sequence.tokens(0, tokens)))
    text = f"{tuple(sequence.request.cache_key)!r} {ids}"
    return blake2b(text.encode(), digest_size=16).hexdigest()
