"""A decode replica: owns its requests from submission to their last token, and their KV.

It decides whether a prompt's uncached part is worth a remote prefill, fetches the pages, batches
continuously, and sends each ingress one message per engine step. A request that leaves unfinished
(drain, engine failure) is reported as `moved`, and the ingress goes on with it elsewhere: the same
path as for a replica that was killed. A plain class; actors.py wraps it.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from cluster.clock import Clock
from serve.clients import Draining, ReplicaLost
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop
from serve.engine.sequence import Output, Sequence
from serve.kv.device import Storage
from serve.peers import PrefillPeers
from serve.replica import between_steps
from serve.state import ReplicaState
from serve.transport import HandoffLost, PrefillReply, Transport
from serve.wire import Moved, failed, pack

SILENT_INGRESS_S = 6.0  # an ingress that has not called for so long is gone, and its clients too


@dataclass
class _Channel:
    """What waits to be sent to one ingress, and when that ingress was last heard."""

    heard_s: float
    outbox: list[Output | Moved] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False


@dataclass(eq=False)
class _Job:
    """A request that is here: whose it is, and the hand-off under way for it, if one is."""

    ingress_id: str
    group: str = ""
    handoff: asyncio.Task[None] | None = None


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
        clock: Clock,
    ) -> None:
        self.replica_id = replica_id
        self.storage = storage
        self.transport = transport
        self.peers = peers
        self.min_remote_tokens = min_remote_tokens
        self.clock = clock
        self.loop = EngineLoop(
            engine, on_outputs=self._on_outputs, on_death=self._on_death, clock=clock
        )
        self.draining = False
        self.handed_bytes = self.remote_prefills = self.local_prefills = 0
        self._channels: dict[str, _Channel] = {}
        self._jobs: dict[str, _Job] = {}
        self._pages_freed = asyncio.Event()
        self._reserving = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin serving, on the running event loop."""
        self._events = asyncio.get_running_loop()
        self.loop.start()
        self._tasks.append(asyncio.create_task(self._forget_silent()))

    async def stop(self) -> None:
        """End the engine's thread and unlink the storage; idempotent."""
        handoffs = [job.handoff for job in self._jobs.values() if job.handoff is not None]
        for task in (*self._tasks, *handoffs):
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
        self.loop.engine.refuse_impossible(sequence)
        request_id = sequence.request_id
        if request_id in self._jobs:
            raise ValueError(f"request {request_id} is already here")
        self._jobs[request_id] = _Job(ingress_id, sequence.request.group)
        try:
            await self._place(sequence)
        except BaseException:
            if request_id in self._jobs:
                self._drop([request_id])
            raise

    async def abort(self, request_ids: list[str]) -> int:
        """Drop requests in any state; returns how many were here. Idempotent."""
        known = [request_id for request_id in request_ids if request_id in self._jobs]
        self._drop(known)
        await between_steps(self.loop, lambda _: None)  # the engine has done it when this returns
        self._pages_freed.set()
        return len(known)

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        """Messages for one ingress, one per engine step that touched its sequences.

        Ends when this replica has given the ingress up for silent; what it had is gone then.
        """
        channel = self._channel(ingress_id)
        while not channel.closed:
            await channel.changed.wait()
            channel.changed.clear()
            outbox, channel.outbox = channel.outbox, []
            if outbox:
                yield pack(outbox)

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        """How this replica is. An ingress names itself, which keeps its requests alive."""
        if ingress_id is not None:
            self._channel(ingress_id).heard_s = self.clock.now_s()
        return ReplicaState(
            replica_id=self.replica_id,
            role="decode",
            failure=self.loop.failure,
            silent_s=self.clock.now_s() - self.loop.last_alive_s,
            draining=self.draining,
            leases=0,
            handed_bytes=self.handed_bytes,
            remote_prefills=self.remote_prefills,
            local_prefills=self.local_prefills,
            stats=self.loop.engine.stats(),
        )

    async def drain(self, deadline_s: float) -> int:
        """Take nothing new, let requests finish until `deadline_s` from now, send the rest away.

        Returns how many had to move. Idempotent.
        """
        self.draining = True
        end_s = self.clock.now_s() + deadline_s
        while self._jobs and self.clock.now_s() < end_s:
            await self.clock.sleep(0.05)
        return await self._send_away()

    async def _send_away(self) -> int:
        jobs = dict(self._jobs)
        await self.abort(list(jobs))
        for request_id, job in jobs.items():
            self._send(job.ingress_id, Moved(request_id))
        return len(jobs)

    def _drop(self, request_ids: list[str]) -> None:
        """Forget jobs that are here and have the engine drop their sequences before its next step.

        At once, so that a job cannot take another step in between; what a hand-off under way has
        with the prefill replica, its own cleanup ends.
        """
        for request_id in request_ids:
            job = self._jobs.pop(request_id)
            if job.handoff is not None:
                job.handoff.cancel()
        self.loop.call(lambda engine: [engine.abort(request_id) for request_id in request_ids])

    async def _place(self, sequence: Sequence) -> None:
        """Start a sequence: with a remote prefill where that pays, else right here."""
        if sequence.request.group:
            self._in_background(sequence, self._join(sequence, self._siblings(sequence)))
        elif await self._remote_pays(sequence):
            self._in_background(sequence, self._import(sequence))
        elif sequence.request_id in self._jobs:  # not aborted meanwhile
            await self._prefill_here(sequence)

    def _siblings(self, sequence: Sequence) -> list[_Job]:
        """The jobs of the same group that were here before."""
        mine, group = self._jobs[sequence.request_id], sequence.request.group
        return [job for job in self._jobs.values() if job.group == group and job is not mine]

    async def _join(self, sequence: Sequence, siblings: list[_Job]) -> None:
        """Start one of several choices: the first like any request, the others here and after it,
        so that they find its pages."""
        if not siblings and await self._remote_pays(sequence):
            await self._import(sequence)
            return
        starting = [job.handoff for job in siblings if job.handoff and not job.handoff.done()]
        if starting:
            await asyncio.wait(starting[:1])
        await self._prefill_here(sequence)

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
        job.handoff = asyncio.create_task(self._guarded(sequence, work))

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
            self._route([failed(request_id, len(sequence.output), error)])
            raise
        finally:
            work.close()  # where the task was cancelled before it began

    async def _reserve(self, sequence: Sequence) -> None:
        """Wait until pages for the whole prompt are ours; first come, first served."""
        async with self._reserving:
            while not await between_steps(self.loop, lambda engine: engine.reserve(sequence)):
                self._pages_freed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self._pages_freed.wait()

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
        self._events.call_soon_threadsafe(self._route, outputs)

    def _on_death(self, why: str) -> None:
        def report() -> None:
            jobs = dict(self._jobs)
            self._drop(list(jobs))
            for request_id, job in jobs.items():
                self._send(job.ingress_id, Moved(request_id))

        self._events.call_soon_threadsafe(report)

    def _route(self, outputs: list[Output]) -> None:
        """Sort a step's outputs by ingress; whoever was aborted meanwhile is dropped here."""
        by_ingress: dict[str, list[Output | Moved]] = defaultdict(list)
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            by_ingress[job.ingress_id].append(output)
            if output.delta.finish is not None:
                del self._jobs[output.request_id]
                self._pages_freed.set()
        for ingress_id, batch in by_ingress.items():
            self._send(ingress_id, *batch)

    def _send(self, ingress_id: str, *items: Output | Moved) -> None:
        channel = self._channel(ingress_id)
        channel.outbox.extend(items)
        channel.changed.set()

    def _channel(self, ingress_id: str) -> _Channel:
        if ingress_id not in self._channels:
            self._channels[ingress_id] = _Channel(heard_s=self.clock.now_s())
        return self._channels[ingress_id]

    async def _forget_silent(self) -> None:
        """Stop work for ingresses that died: nobody is left to read its tokens."""
        while True:
            await self.clock.sleep(SILENT_INGRESS_S / 5)
            oldest_s = self.clock.now_s() - SILENT_INGRESS_S
            silent = [i for i, channel in self._channels.items() if channel.heard_s < oldest_s]
            for ingress_id in silent:
                channel = self._channels.pop(ingress_id)
                channel.closed = True
                channel.changed.set()
                self._drop([r for r, job in self._jobs.items() if job.ingress_id == ingress_id])
                self._pages_freed.set()
