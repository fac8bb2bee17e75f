"""The ingress: holds each request's record while decode replicas come and go.

It routes a request to a decode replica, reads one message per step from each replica, and hands the
deltas to whoever awaits them. When a replica dies, drains or drops a request, the record (prompt,
terms, tokens delivered so far) goes to another one and the same tokens follow. A plain class that
fulfils serve.service.Service; the HTTP edge and the tests call it.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.clock import Clock
from serve.clients import ConnectDecode, DecodeClient, Draining, ReplicaLost
from serve.directory import Directory
from serve.engine.sequence import Delta, Limits, Output, Request, Sampling, Sequence
from serve.errors import RequestError, refuse
from serve.kv.prefix import CacheKey
from serve.route import least_loaded
from serve.status import summary
from serve.wire import Moved, unpack

PING_S = 2.0  # well below decode.SILENT_INGRESS_S
PROBE_S = 5.0  # a probe that takes longer counts as failed
FRESH_S = 2.0  # a token younger than this proves readiness without a probe


@dataclass
class Record:
    """A request under way: what was delivered, which replica has it, what waits to be read.

    An event of None means: that replica is out of it, go on elsewhere.
    """

    sequence: Sequence
    replica_id: str | None = None
    load_tokens: int = 0
    events: asyncio.Queue[Delta | None] = field(default_factory=asyncio.Queue)
    finished: bool = False


@dataclass
class _Link:
    """The connection to one decode replica."""

    client: DecodeClient
    tasks: list[asyncio.Task[None]]


class Ingress:
    """Owns the records of one ingress process; everything runs on one event loop."""

    def __init__(
        self, ingress_id: str, connect: ConnectDecode, *, patience_s: float, clock: Clock
    ) -> None:
        self.ingress_id = ingress_id
        self.connect = connect
        self.patience_s = patience_s
        self.clock = clock
        self.directory = Directory()
        self.resumed = 0
        self._records: dict[str, Record] = {}
        self._links: dict[str, _Link] = {}
        self._load_tokens: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._last_token_s = float("-inf")
        self._probes = 0

    def update(self, directory: Directory) -> None:
        """Take in a newer directory: link to new decode replicas, give up those that are gone."""
        self.directory = directory
        present = {e.replica_id for e in directory.entries if e.role == "decode"}
        for replica_id in set(self._links) - present:
            self._drop(replica_id)
        for entry in directory.ready("decode"):
            if entry.replica_id not in self._links:
                self._link(entry.replica_id)
        self._changed.set()

    async def stop(self) -> None:
        """End every background task; idempotent."""
        for replica_id in list(self._links):
            self._drop(replica_id)
        for task in list(self._background):
            task.cancel()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, whatever happens to replicas meanwhile (see Service)."""
        if request.request_id in self._records:
            raise refuse(f"Request id {request.request_id!r} is already in use.", "request_id")
        record = Record(Sequence(request))
        self._records[request.request_id] = record
        try:
            await self._place(record)
            while not record.finished:
                delta = await record.events.get()
                if delta is None:
                    self.resumed += 1
                    await self._place(record)
                    continue
                record.finished = delta.finish is not None
                yield delta
        finally:
            self._forget(record)

    async def probe(self) -> bool:
        """True when a token came out just now, or can be made within PROBE_S."""
        if self.clock.now_s() - self._last_token_s < FRESH_S:
            return True
        try:
            async with asyncio.timeout(PROBE_S):
                async with contextlib.aclosing(self.generate(self._probe_request())) as deltas:
                    return [delta.finish async for delta in deltas][-1] == "length"
        except (TimeoutError, RequestError):
            return False

    async def status(self) -> dict[str, Any]:
        """Replicas and counters as plain JSON values; "metrics" sums what the edge exports."""
        return {
            "ingress_id": self.ingress_id,
            "requests": len(self._records),
            "resumed": self.resumed,
            "replicas": [asdict(entry) for entry in self.directory.entries],
            "metrics": summary(self.directory),
        }

    def _probe_request(self) -> Request:
        self._probes += 1
        return Request(
            request_id=f"{self.ingress_id}-probe-{self._probes}",
            prompt=(0,),
            sampling=Sampling(temperature=0.0),
            limits=Limits(max_tokens=1, ignore_eos=True),
            cache_key=CacheKey("readiness", "", ""),
        )

    async def _place(self, record: Record) -> None:
        """Give a record to a decode replica, waiting for one if need be.

        RequestError 503 when there is none within `patience_s`, 400 when it can never fit.
        """
        end_s = self.clock.now_s() + self.patience_s
        refused: set[str] = set()
        while True:
            ready = [e.replica_id for e in self.directory.ready("decode")]
            usable = [r for r in ready if r in self._links and r not in refused]
            replica_id = least_loaded(usable, self._load_tokens)
            if replica_id is None:
                await self._wait_for_change(end_s)
                refused.clear()
                continue
            try:
                return await self._submit(record, replica_id)
            except (Draining, ReplicaLost):
                refused.add(replica_id)

    async def _submit(self, record: Record, replica_id: str) -> None:
        # Set first: tokens may arrive before the answer to the call does.
        record.replica_id = replica_id
        record.load_tokens = len(record.sequence)
        self._load_tokens[replica_id] += record.load_tokens
        try:
            payload = record.sequence.to_bytes()
            await self._links[replica_id].client.submit(payload, self.ingress_id)
        except BaseException as error:
            self._release(record)
            if isinstance(error, ValueError):
                raise refuse(f"{error}.", None, "context_length_exceeded") from error
            raise

    async def _wait_for_change(self, end_s: float) -> None:
        """Until the directory changes (or a moment passes); RequestError 503 after `end_s`."""
        left_s = end_s - self.clock.now_s()
        if left_s <= 0:
            text = f"No decode replica became ready within {self.patience_s:g} s."
            raise RequestError(503, "server_error", None, text, "no_replica", retry_after_s=5.0)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min(left_s, 0.5))

    def _link(self, replica_id: str) -> None:
        client = self.connect(replica_id)
        tasks = [
            asyncio.create_task(self._read(replica_id, client)),
            asyncio.create_task(self._keep_alive(replica_id, client)),
        ]
        self._links[replica_id] = _Link(client, tasks)

    def _drop(self, replica_id: str) -> None:
        """A replica is out: every record that it had goes on elsewhere."""
        link = self._links.pop(replica_id, None)
        if link is not None:
            for task in link.tasks:
                task.cancel()
        for record in self._records.values():
            if record.replica_id == replica_id:
                self._release(record)
                record.events.put_nowait(None)
        self._changed.set()

    async def _read(self, replica_id: str, client: DecodeClient) -> None:
        """Take in a replica's messages until it is lost."""
        try:
            async for message in client.tokens(self.ingress_id):
                for item in unpack(message):
                    self._take_in(replica_id, item)
        except ReplicaLost:
            self._drop(replica_id)

    async def _keep_alive(self, replica_id: str, client: DecodeClient) -> None:
        """Let a replica know that somebody still reads what it makes."""
        while True:
            await self.clock.sleep(PING_S)
            try:
                await client.ping(self.ingress_id)
            except ReplicaLost:
                self._drop(replica_id)

    def _take_in(self, replica_id: str, item: Output | Moved) -> None:
        record = self._records.get(item.request_id)
        if record is None or record.replica_id != replica_id:
            return  # finished, given up, or resumed elsewhere meanwhile
        if isinstance(item, Moved):
            self._release(record)
            record.events.put_nowait(None)
            return
        output = record.sequence.output
        fresh = item.delta.token_ids[max(len(output) - item.index, 0) :]
        if not fresh and item.delta.finish is None:
            return  # delivered before
        assert item.index <= len(output), "a replica skipped a token"
        output.extend(fresh)
        record.sequence.cached_tokens = item.delta.cached_tokens
        record.events.put_nowait(replace(item.delta, token_ids=tuple(fresh)))
        self._last_token_s = self.clock.now_s()
        if item.delta.finish is not None:
            self._release(record)

    def _release(self, record: Record) -> None:
        """The record has no replica any more."""
        if record.replica_id is not None:
            self._load_tokens[record.replica_id] -= record.load_tokens
            record.replica_id = None

    def _forget(self, record: Record) -> None:
        """The consumer is done with a record: stop the work if it was not finished."""
        request_id = record.sequence.request_id
        del self._records[request_id]
        link = self._links.get(record.replica_id or "")
        self._release(record)
        if not record.finished and link is not None:
            self._later(link.client.abort([request_id]))

    def _later(self, call: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            with contextlib.suppress(ReplicaLost):
                await call

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
