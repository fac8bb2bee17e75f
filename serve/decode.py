"""A decode replica: owns its requests from submission to their last token, and their KV.

It decides whether a prompt's uncached part is worth a remote prefill, fetches the pages, batches
continuously, and sends each ingress one message per engine step. A request that leaves unfinished
(drain, engine failure) is reported as `moved`, with the place where its KV is parked if it is, and
the ingress goes on with it elsewhere: the same path as for a replica that was killed. A plain
class; actors.py wraps it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from cluster.clock import Clock
from serve.clients import ConnectParking, Draining, ReplicaLost
from serve.directory import Directory
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop
from serve.engine.sequence import Output, Sequence
from serve.jobs import Job, Jobs, first_started
from serve.kv.device import Storage
from serve.migrate.arrive import Arrivals
from serve.migrate.depart import Departure, Rules
from serve.migrate.parking import Parking
from serve.peers import PrefillPeers
from serve.replica import between_steps
from serve.state import ReplicaState
from serve.transport import HandoffLost, Offer, PrefillReply, Transport
from serve.wire import failed

SILENT_INGRESS_S = 6.0  # an ingress that has not called for so long is gone, and its clients too


class DecodeReplica:
    """Serves `submit`, `abort`, `tokens`, `drain` and `ping` on one event loop."""

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        storage: Storage,
        transport: Transport,
        peers: PrefillPeers,
        *,
        min_remote_tokens: int,
        connect: ConnectParking,
        rules: Rules,
        clock: Clock,
    ) -> None:
        """connect: reaches other decode replicas by id, to take over what they parked."""
        self.replica_id = replica_id
        self.storage = storage
        self.transport = transport
        self.peers = peers
        self.min_remote_tokens = min_remote_tokens
        self.clock = clock
        self.loop = EngineLoop(
            engine, on_outputs=self._on_outputs, on_death=self._on_death, clock=clock
        )
        self.parking = Parking(replica_id, storage, transport, clock)
        self.arrivals = Arrivals(self.loop, storage, transport, connect)
        self.rules = rules
        self.draining = False
        self._elsewhere = False
        self.handed_bytes = self.remote_prefills = self.local_prefills = 0
        self._jobs = Jobs(self.loop, clock)
        self._reserving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin serving, on the running event loop."""
        self._events = asyncio.get_running_loop()
        self.loop.start()
        self._tasks.append(asyncio.create_task(self._forget_silent()))

    async def stop(self) -> None:
        """End the engine's thread and unlink the storage; idempotent."""
        for task in (*self._tasks, *self._jobs.starting()):
            task.cancel()
        await asyncio.to_thread(self.loop.stop)
        self.transport.close()
        self.storage.close()

    async def submit(self, payload: bytes, ingress_id: str) -> None:
        """Take a serialized sequence; its tokens go out on the channel `tokens(ingress_id)`.

        Its request id is of this submission alone, so that an abort of an earlier one, or what is
        left of it, never meets it. Draining when this replica is on its way out. ValueError when
        the sequence can never fit or the id is here already.
        """
        if self.draining or self.loop.failure is not None:
            raise Draining(f"{self.replica_id} takes no new requests")
        sequence = Sequence.from_bytes(payload)
        sequence.known_tokens = _known_tokens(sequence)
        self.loop.engine.refuse_impossible(sequence)
        request_id = sequence.request_id
        self._jobs.add(request_id, ingress_id, sequence.request.group)
        try:
            await self._place(sequence)
        except BaseException:
            self._jobs.drop([request_id])
            raise

    async def abort(self, request_ids: list[str]) -> int:
        """Drop requests in any state; returns how many were here. Idempotent."""
        return len(await self._jobs.abort(request_ids))

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        """Messages for one ingress, one per engine step that touched its sequences.

        Ends when this replica has given the ingress up for silent; what it had is gone then.
        """
        async for message in self._jobs.channels.read(ingress_id, self.clock.now_s()):
            yield message

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        """How this replica is. An ingress names itself, which keeps its requests alive."""
        if ingress_id is not None:
            self._jobs.channels.heard(ingress_id, self.clock.now_s())
        return ReplicaState(
            replica_id=self.replica_id,
            role="decode",
            failure=self.loop.failure,
            silent_s=self.clock.now_s() - self.loop.last_alive_s,
            draining=self.draining,
            leases=len(self.parking.leases),
            handed_bytes=self.handed_bytes,
            remote_prefills=self.remote_prefills,
            local_prefills=self.local_prefills,
            stats=self.loop.engine.stats(),
            migrated=self.arrivals.counts,
        )

    def update(self, directory: Directory) -> None:
        """Take in a newer directory: who computes prompts, and whether another may take over."""
        self.peers.update(directory)
        ready = directory.ready("decode")
        self._elsewhere = any(entry.replica_id != self.replica_id for entry in ready)

    async def drain(self, deadline_s: float) -> int:
        """Take nothing new, let requests finish or move within `deadline_s`, send the rest away.

        Returns how many went on elsewhere. Idempotent.
        """
        self.draining = True
        departure = Departure(
            self._jobs, self.parking, self.storage, self.rules, lambda: self._elsewhere
        )
        return await departure.run(deadline_s)

    async def export(self, lease_id: str, skip_tokens: int) -> Offer:
        """Lend what is parked here under a lease. HandoffLost when that has ended."""
        return await between_steps(self.loop, lambda _: self.parking.export(lease_id, skip_tokens))

    async def acknowledge(self, lease_id: str) -> bool:
        """Whoever took a parked request over has its pages: they are free. Idempotent."""
        return await between_steps(self.loop, lambda _: self.parking.leases.acknowledge(lease_id))

    async def _place(self, sequence: Sequence) -> None:
        """Start a sequence: from KV that is parked elsewhere, with a remote prefill where that
        pays, else right here."""
        siblings = self._jobs.siblings(sequence.request_id) if sequence.request.group else []
        if sequence.parked is not None:
            self._in_background(sequence, self._take_over(sequence, siblings))
        elif sequence.request.group:
            self._in_background(sequence, self._join(sequence, siblings))
        elif await self._remote_pays(sequence):
            self._in_background(sequence, self._import(sequence))
        elif sequence.request_id in self._jobs:  # not aborted meanwhile
            await self._prefill_here(sequence)

    async def _join(self, sequence: Sequence, siblings: list[Job]) -> None:
        """Start one of several choices: the first like any request, the others here and after it,
        so that they find its pages."""
        if not siblings and await self._remote_pays(sequence):
            await self._import(sequence)
            return
        await first_started(siblings)
        await self._prefill_here(sequence)

    async def _take_over(self, sequence: Sequence, siblings: list[Job]) -> None:
        """Go on where a draining replica has stopped; with siblings, on the first one's pages."""
        await first_started(siblings)
        await self.arrivals.take(sequence, self._reserve)

    async def _remote_pays(self, sequence: Sequence) -> bool:
        """Whether a prefill replica should compute the prompt."""
        wants_token = not sequence.request.embed and sequence.request.score is None
        if not wants_token or not self.peers.any():
            return False
        tokens, key = sequence.tokens(0, len(sequence)), sequence.request.cache_key
        cached = await between_steps(self.loop, lambda e: e.scheduler.tree.peek(key, tokens))
        return len(sequence) - cached >= self.min_remote_tokens

    def _in_background(self, sequence: Sequence, work: Coroutine[Any, Any, None]) -> None:
        job = self._jobs.get(sequence.request_id)
        if job is None:  # aborted meanwhile
            work.close()
            return
        job.starting = asyncio.create_task(self._guarded(sequence, work))

    async def _prefill_here(self, sequence: Sequence) -> None:
        self.local_prefills += 1
        await between_steps(self.loop, lambda engine: engine.add(sequence))

    async def _import(self, sequence: Sequence) -> None:
        """Have a prefill replica compute the prompt, copy its pages, and run the sequence."""
        await self._reserve(sequence)
        reply = await self.peers.prefill(sequence)
        if reply is None or not await self._adopt(sequence, reply):
            self.local_prefills += 1
            await between_steps(self.loop, lambda e: e.give_up_reservation(sequence.request_id))

    async def _guarded(self, sequence: Sequence, work: Coroutine[Any, Any, None]) -> None:
        """Nobody awaits the task that starts a sequence: the request hears of what went wrong."""
        request_id = sequence.request_id
        try:
            await work
        except ReplicaLost:
            pass  # our own engine: `_on_death` tells the ingress
        except Exception as error:
            self.loop.call(lambda e: e.abort(request_id))
            self._jobs.route([failed(request_id, len(sequence.output), error)])
            raise
        finally:
            work.close()  # where the task was cancelled before it began

    async def _reserve(self, sequence: Sequence) -> None:
        """Wait until pages for the whole prompt are ours; first come, first served."""
        async with self._reserving:
            while not await between_steps(self.loop, lambda engine: engine.reserve(sequence)):
                self._jobs.freed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self._jobs.freed.wait()

    async def _adopt(self, sequence: Sequence, reply: PrefillReply) -> bool:
        """Copy an offer into the reserved pages and let the sequence run; False if it was lost."""
        try:
            await between_steps(self.loop, lambda e: self._fetch(e, sequence, reply))
        except HandoffLost:
            return False
        finally:
            self.peers.acknowledge(reply.offer.lease_id)
        self.remote_prefills += 1
        return True

    def _fetch(self, engine: Engine, sequence: Sequence, reply: PrefillReply) -> None:
        """On the engine's thread, between steps: nothing else can touch the reserved pages."""
        if engine.reserved.get(sequence.request_id) is not sequence:
            return  # aborted while its prompt was computed
        assert sequence.table is not None
        offer = reply.offer
        first = offer.start_tokens // self.storage.shape.page_tokens
        pages = sequence.table.pages[first : first + len(offer.pages)]
        self.handed_bytes += self.transport.fetch(offer, self.storage, pages)
        if not sequence.output:
            sequence.cached_tokens = max(sequence.cached_tokens, reply.cached_tokens)
        self._on_outputs([engine.adopt(sequence.request_id, reply.token, reply.logprob)])

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._events.call_soon_threadsafe(self._jobs.route, outputs)

    def _on_death(self, why: str) -> None:
        self._events.call_soon_threadsafe(self._jobs.lose_all)

    async def _forget_silent(self) -> None:
        while True:
            await self.clock.sleep(SILENT_INGRESS_S / 5)
            self._jobs.forget_silent(SILENT_INGRESS_S)


def _known_tokens(sequence: Sequence) -> int:
    """Leading tokens that have been computed before: all but the last, once there is output."""
    parked = 0 if sequence.parked is None else sequence.parked.tokens
    return max(parked, len(sequence) - 1 if sequence.output else 0)
