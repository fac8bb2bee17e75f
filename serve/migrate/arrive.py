"""Taking a sequence over with its KV: reserve pages, fetch what is not here already, go on.

Whatever goes wrong (the other replica is gone, its lease has ended, no pages in time, bytes of
another format) ends in the same place: the sequence is computed again here, as it would have been
without. The pages of another sequence are never taken: the digest of the tokens must be this one's,
and a page that changed hands while it was copied is seen by its generation number. Called by
decode.py.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from serve.clients import ConnectParking, ParkingClient, ReplicaLost
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop
from serve.engine.sequence import Parked, Sequence
from serve.kv.device import Storage
from serve.migrate import codec
from serve.migrate.parking import digest
from serve.replica import between_steps
from serve.state import Migrated
from serve.transport import HandoffLost, Offer, Transport

LOST = (ReplicaLost, HandoffLost, TimeoutError, ValueError)


class Arrivals:
    """Of one replica; `counts` says how they went."""

    def __init__(
        self, loop: EngineLoop, storage: Storage, transport: Transport, connect: ConnectParking
    ) -> None:
        self.loop = loop
        self.storage = storage
        self.transport = transport
        self.connect = connect
        self.counts = Migrated()
        self._background: set[asyncio.Task[None]] = set()

    async def take(
        self, sequence: Sequence, reserve: Callable[[Sequence], Awaitable[None]]
    ) -> None:
        """Run a sequence that comes with `parked`, from its KV if that can be had.

        reserve: waits until pages for all its tokens are the sequence's. ReplicaLost when our own
        engine has stopped.
        """
        parked, sequence.parked = sequence.parked, None
        assert parked is not None
        source = self.connect(parked.replica_id)
        try:
            if not await self._fetched(sequence, parked, source, reserve):
                self.counts = self.counts.plus(failed=1)
                await between_steps(self.loop, lambda engine: _compute_here(engine, sequence))
        finally:
            self._acknowledge(source, parked.lease_id)

    async def _fetched(
        self,
        sequence: Sequence,
        parked: Parked,
        source: ParkingClient,
        reserve: Callable[[Sequence], Awaitable[None]],
    ) -> bool:
        """Whether the sequence goes on from its KV; else nothing of it has been used."""
        if not 0 < parked.tokens < len(sequence) or digest(sequence, parked.tokens) != (
            parked.digest
        ):
            return False
        size = self.storage.shape.page_tokens
        offer: Offer | None = None
        try:
            async with asyncio.timeout(parked.lease_s):
                await reserve(sequence)
        except TimeoutError:
            return False
        first = sequence.computed_tokens // size
        if sequence.computed_tokens < parked.tokens:
            try:
                async with asyncio.timeout(parked.lease_s):
                    offer = await source.export(parked.lease_id, first * size)
            except LOST:
                return False
        try:
            moved = await between_steps(self.loop, lambda e: self._resume(e, sequence, offer))
        except (HandoffLost, ValueError):
            return False
        tokens = 0 if offer is None else offer.tokens
        self.counts = self.counts.plus(requests=1, tokens=tokens, bytes=moved)
        return True

    def _resume(self, engine: Engine, sequence: Sequence, offer: Offer | None) -> int:
        """On the engine's thread: copy the offer and let the sequence run; the bytes that came."""
        if engine.reserved.get(sequence.request_id) is not sequence:
            return 0  # aborted meanwhile
        assert sequence.table is not None
        if offer is None:  # all of it was cached here
            engine.resume(sequence.request_id, sequence.computed_tokens)
            return 0
        first = offer.start_tokens // self.storage.shape.page_tokens
        pages = sequence.table.pages[first : first + len(offer.pages)]
        if codec.carries(offer):
            moved = codec.fetch(offer, self.storage, pages)
            sequence.exact = False
        else:
            moved = self.transport.fetch(offer, self.storage, pages)
        engine.resume(sequence.request_id, offer.stop_tokens)
        return moved

    def _acknowledge(self, source: ParkingClient, lease_id: str) -> None:
        """Tell the other side, without waiting, that its pages may go."""

        async def tell() -> None:
            with contextlib.suppress(ReplicaLost):
                await source.acknowledge(lease_id)

        task = asyncio.create_task(tell())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _compute_here(engine: Engine, sequence: Sequence) -> None:
    """Whatever became of its reservation, have the sequence computed by this engine."""
    if sequence.request_id in engine.reserved:
        engine.give_up_reservation(sequence.request_id)
    elif sequence.request_id not in engine.sequences:
        engine.add(sequence)
