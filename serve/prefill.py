"""A prefill replica: computes prompts, lends their pages, and keeps the prompts it has seen cached.

A plain class around an EngineLoop; the Ray actor in actors.py is a shell around it, and tests and
the one-process mode use it as it is. Called by decode replicas only (decode orchestrates).
"""

import asyncio
import contextlib

from cluster.clock import Clock
from serve.clients import ReplicaLost
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop
from serve.engine.sequence import Output, Sequence
from serve.handoff import LeaseTable
from serve.kv.device import Storage
from serve.replica import between_steps
from serve.state import ReplicaState
from serve.transport import HandoffLost, Offer, PrefillReply, Transport


class PrefillReplica:
    """Serves `prefill`, `acknowledge`, `abort` and `ping` on one event loop."""

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        storage: Storage,
        transport: Transport,
        *,
        lease_s: float,
        clock: Clock,
    ) -> None:
        self.replica_id = replica_id
        self.storage = storage
        self.transport = transport
        self.clock = clock
        self.leases = LeaseTable(clock, lease_s)
        self.loop = EngineLoop(
            engine, on_outputs=self._on_outputs, on_death=self._on_death, clock=clock
        )
        self._waiting: dict[str, asyncio.Future[Output]] = {}
        self._lent = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin serving, on the running event loop."""
        self._events = asyncio.get_running_loop()
        self.loop.start()
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def stop(self) -> None:
        """End the engine's thread and unlink the storage; idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.loop.stop)
        self.storage.close()

    async def prefill(self, payload: bytes, skip_tokens: int) -> PrefillReply:
        """Compute a serialized sequence's tokens and lend their KV from `skip_tokens` on.

        `skip_tokens` is a whole number of pages that the caller holds already. Cancelling the call
        drops the work. ValueError when the sequence can never fit here, HandoffLost when it was
        aborted meanwhile, ReplicaLost when the engine stops.
        """
        sequence = Sequence.from_bytes(payload)
        request_id = sequence.request_id
        if request_id in self._waiting:
            raise ValueError(f"request {request_id} is already being prefilled here")
        computed: asyncio.Future[Output] = self._events.create_future()
        self._waiting[request_id] = computed
        try:
            await between_steps(self.loop, lambda engine: engine.add(sequence, hold=True))
            output = await computed
            offer = await between_steps(self.loop, lambda e: self._lend(e, request_id, skip_tokens))
        except BaseException:
            self.loop.call(lambda engine: self._drop(engine, request_id))
            raise
        finally:
            del self._waiting[request_id]
            computed.cancel()  # an error set on it that nobody came to await is not one to log
        logprob = next(iter(output.delta.logprobs), None)
        return PrefillReply(output.delta.token_ids[0], sequence.cached_tokens, offer, logprob)

    async def acknowledge(self, lease_id: str) -> bool:
        """The caller has copied an offer: its pages are free. Idempotent."""
        return await between_steps(self.loop, lambda _: self.leases.acknowledge(lease_id))

    async def abort(self, request_id: str) -> bool:
        """Drop a request in any state, its lease included. Idempotent; False when unknown."""
        computed = self._waiting.get(request_id)
        if computed is not None and not computed.done():  # its caller may no longer be there
            computed.set_exception(HandoffLost(f"request {request_id} was aborted"))
        return await between_steps(self.loop, lambda engine: self._drop(engine, request_id))

    async def drain(self, deadline_s: float) -> int:
        """Wait until nothing is being computed or lent, at most `deadline_s`; nothing ever moves,
        since whoever asked for a prompt can ask another replica. Returns 0."""
        end_s = self.clock.now_s() + deadline_s
        while (self._waiting or len(self.leases)) and self.clock.now_s() < end_s:
            await self.clock.sleep(0.05)
        return 0

    async def ping(self) -> ReplicaState:
        """How this replica is; the caller puts a deadline on the answer."""
        return ReplicaState(
            replica_id=self.replica_id,
            role="prefill",
            failure=self.loop.failure,
            silent_s=self.clock.now_s() - self.loop.last_alive_s,
            draining=False,
            leases=len(self.leases),
            handed_bytes=0,
            remote_prefills=0,
            local_prefills=0,
            stats=self.loop.engine.stats(),
        )

    def _drop(self, engine: Engine, request_id: str) -> bool:
        return engine.abort(request_id) | (self.leases.abort(request_id) > 0)

    def _lend(self, engine: Engine, request_id: str, skip_tokens: int) -> Offer:
        held = engine.held.get(request_id)
        if held is None:
            raise HandoffLost(f"request {request_id} was aborted")
        assert held.table is not None
        page_tokens = self.storage.shape.page_tokens
        assert skip_tokens % page_tokens == 0, skip_tokens
        self._lent += 1
        lease_id = f"{self.replica_id}/{self._lent}"
        self.leases.grant(lease_id, request_id, lambda: engine.free_held(request_id))
        pages = held.table.pages[skip_tokens // page_tokens :]
        stop = held.computed_tokens
        return self.transport.offer(lease_id, self.storage, pages, skip_tokens, stop)

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._events.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            computed = self._waiting.get(output.request_id)
            if computed is not None and not computed.done():
                computed.set_result(output)

    def _on_death(self, why: str) -> None:
        self._events.call_soon_threadsafe(self._fail, why)

    def _fail(self, why: str) -> None:
        for computed in self._waiting.values():
            if not computed.done():
                computed.set_exception(ReplicaLost(f"the engine has stopped: {why}"))

    async def _sweep(self) -> None:
        """Free expired leases, since a receiver that was killed acknowledges nothing."""
        with contextlib.suppress(ReplicaLost):  # the engine has stopped: nothing is lent any more
            while True:
                await self.clock.sleep(min(1.0, self.leases.lease_s / 4))
                await between_steps(self.loop, lambda _: self.leases.sweep())
