"""The ingress: holds each request's record while decode replicas come and go.

It routes a request to a decode replica, reads one message per step from each replica, and hands the
deltas to whoever awaits them. When a replica dies, drains or drops a request, the record (prompt,
terms, tokens delivered so far) goes to another one and the same tokens follow. Every connection to
a replica and every submission of a request has a name of its own, so that nothing late, lost or
left over is taken for something else. A plain class that fulfils serve.service.Service; the HTTP
edge and the tests call it.
"""

import asyncio
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import asdict, replace
from typing import Any

from cluster.clock import Clock
from serve.backlog import Backlog
from serve.clients import ConnectDecode, Draining, ReplicaLost
from serve.directory import Directory
from serve.engine.cost import StepCost
from serve.engine.sequence import Delta, Output, Request, Sequence
from serve.errors import RequestError, refuse
from serve.events import Events
from serve.prefixes import Guesses, PlacedPrefixes
from serve.probe import probe_request
from serve.record import Link, Record
from serve.route import Choice, cheapest
from serve.status import Totals, gauges
from serve.wire import Moved, unpack

PING_S = 2.0  # well below decode.SILENT_INGRESS_S
ANSWER_S = 10.0  # a decode replica that answers no ping or submit for so long is given up
MOST_FUTILE_MOVES = 5  # replicas in a row that end before a request has made a token of it
PROBE_S = 5.0  # a probe that takes longer counts as failed
FRESH_S = 2.0  # a token younger than this proves readiness without a probe
ANSWER_TOKENS = 64  # what an open answer counts for in a queue, for nobody knows its length


class Ingress:
    """Owns the records of one ingress process; everything runs on one event loop."""

    def __init__(
        self,
        ingress_id: str,
        connect: ConnectDecode,
        *,
        prefixes: PlacedPrefixes,
        patience_s: float,
        clock: Clock,
        backlog: Backlog | None = None,
    ) -> None:
        """backlog: what may wait for its first token; without one, anything may."""
        self.ingress_id = ingress_id
        self.connect = connect
        self.prefixes = prefixes
        self.patience_s = patience_s
        self.clock = clock
        self.directory = Directory()
        self.backlog = backlog or Backlog(sys.maxsize, sys.maxsize, clock)
        self.resumed = 0
        self.guesses = Guesses()
        self.events = Events(clock)
        self._totals = Totals()
        self._records: dict[str, Record] = {}
        self._placed: dict[str, Record] = {}  # by call id
        self._links: dict[str, Link] = {}
        self._load_tokens: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._last_token_s = float("-inf")
        self._numbers = itertools.count(1)
        self._stopped = False

    def update(self, directory: Directory) -> None:
        """Take in a newer directory: link to new decode replicas, give up those that are gone."""
        self.events.compare(self.directory, directory)
        self._totals.update(directory)
        self.directory = directory
        present = {e.replica_id for e in directory.entries if e.role == "decode"}
        for replica_id in set(self._links) - present:
            self._drop(replica_id)
            self.prefixes.forget(replica_id)
        for entry in directory.ready("decode"):
            if entry.replica_id not in self._links:
                self._link(entry.replica_id)
        self._changed.set()

    async def stop(self) -> None:
        """End every background task, and what is being generated with a 503; idempotent."""
        self._stopped = True
        self.directory = Directory()
        for replica_id in list(self._links):
            self._drop(replica_id)
        for task in list(self._background):
            task.cancel()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of one request, whatever happens to replicas meanwhile (see Service)."""
        self._refuse_when_closing()
        if request.request_id in self._records:
            raise refuse(f"Request id {request.request_id!r} is already in use.", "request_id")
        turn = self.backlog.enter(request)
        try:
            deltas = self._deltas(replace(request, turn=turn))
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    self.backlog.started(request.request_id, delta.cached_tokens)
                    yield delta
        finally:
            self.backlog.leave(request.request_id)

    async def _deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        record = Record(Sequence(request))
        self._records[request.request_id] = record
        try:
            await self._place(record)
            while not record.finished:
                delta = await record.events.get()
                if delta is None:
                    await self._move(record)
                    continue
                record.finished = delta.finish is not None
                yield delta
        finally:
            self._forget(record)

    async def probe(self) -> bool:
        """True when a token came out just now, or can be made within PROBE_S, and not closing."""
        if self.directory.closing:
            return False
        if self.clock.now_s() - self._last_token_s < FRESH_S:
            return True
        request = probe_request(f"{self.ingress_id}-probe-{next(self._numbers)}")
        try:
            async with asyncio.timeout(PROBE_S):
                async with contextlib.aclosing(self._deltas(request)) as deltas:
                    return [delta.finish async for delta in deltas][-1] == "length"
        except (TimeoutError, RequestError):
            return False

    async def status(self) -> dict[str, Any]:
        """Replicas and counters as plain JSON values; "metrics" sums what the edge exports."""
        return {
            "ingress_id": self.ingress_id,
            "requests": len(self._records),
            "resumed": self.resumed,
            "queued": self.backlog.report(),
            "routed": asdict(self.guesses),
            "replicas": [asdict(entry) for entry in self.directory.entries],
            "trouble": self.directory.trouble,
            "events": self.events.listed(),
            "metrics": {
                **gauges(self.directory),
                **self._totals.counters(),
                "requests_resumed": float(self.resumed),
                **self.events.counters(),
                "placed_tokens": float(self._load_tokens.total()),
                "queued_tokens": float(self.backlog.tokens),
                "prefix_expected_tokens": float(self.guesses.expected_tokens),
                "prefix_found_tokens": float(self.guesses.found_tokens),
            },
        }

    def _refuse_when_closing(self) -> None:
        if self.directory.closing:
            text = "The service is being taken down and takes no new requests."
            raise RequestError(503, "server_error", None, text, "closing", retry_after_s=5.0)

    async def _move(self, record: Record) -> None:
        """Go on elsewhere. RequestError as in `_place`, or 500 when moving gets it nowhere."""
        if record.replica_id is not None:
            return  # it was placed again before this event was read
        record.futile_moves += 1
        if record.futile_moves > MOST_FUTILE_MOVES:
            text = f"The request was given up: {record.futile_moves} replicas in a row ended on it."
            raise RequestError(500, "server_error", None, text, "unserviceable")
        self.resumed += 1
        self.events.resumed(record.sequence.request_id)
        await self._place(record)

    async def _place(self, record: Record) -> None:
        """Give a record to a decode replica, waiting for one if need be.

        RequestError 503 when there is none within `patience_s`, 400 when it can never fit.
        """
        end_s = self.clock.now_s() + self.patience_s
        refused: set[str] = set()
        sequence = record.sequence
        tokens = sequence.request.prompt + tuple(sequence.output)
        hashes = self.prefixes.hashes(sequence.request.cache_key, tokens)
        while True:
            ready = [e.replica_id for e in self.directory.ready("decode")]
            usable = [r for r in ready if r in self._links and r not in refused]
            near = sorted(self._siblings_at(record.sequence.request.group).intersection(usable))
            cached = {r: self.prefixes.cached_tokens(r, hashes) for r in usable}
            choice = cheapest(near or usable, self._load_tokens, cached, len(tokens), StepCost())
            if choice is None:
                await self._wait_for_change(end_s)
                refused.clear()
                continue
            try:
                return await self._submit(record, choice, hashes)
            except (Draining, ReplicaLost, TimeoutError):
                refused.add(choice.replica_id)

    def _siblings_at(self, group: str) -> set[str]:
        """The replicas that work on requests of this group, whose pages a sibling can share."""
        if not group:
            return set()
        records = self._records.values()
        return {r.replica_id for r in records if r.replica_id and r.sequence.request.group == group}

    async def _submit(self, record: Record, choice: Choice, hashes: list[bytes]) -> None:
        request_id, replica_id = record.sequence.request_id, choice.replica_id
        link, call_id = self._links[replica_id], f"{request_id}/{next(self._numbers)}"
        named = replace(record.sequence.request, request_id=call_id)
        # Set first: tokens may arrive before the answer to the call does.
        record.replica_id, record.call_id = replica_id, call_id
        record.expected_tokens = None if record.sequence.output else choice.cached_tokens
        answer_tokens = min(record.sequence.request.limits.max_tokens, ANSWER_TOKENS)
        record.load_tokens = round(choice.prefill_cost) + answer_tokens
        self._load_tokens[replica_id] += record.load_tokens
        self._placed[call_id] = record
        try:
            async with asyncio.timeout(ANSWER_S):
                payload = replace(record.sequence, request=named).to_bytes()
                await link.client.submit(payload, link.name)
            record.sequence.parked = None  # it is that replica's to take now
            self.prefixes.note(replica_id, hashes)
            if hashes:  # a prompt of less than a page has no prefix to find
                self.guesses.placed(choice.cached_tokens)
        except (Draining, ReplicaLost):
            self._release(record)
            raise
        except ValueError as error:
            self._release(record)
            raise refuse(f"{error}.", None, "context_length_exceeded") from error
        except BaseException:  # cancelled or too late: the replica may have it all the same
            self._release(record)
            self._later(link.client.abort([call_id]))
            raise

    async def _wait_for_change(self, end_s: float) -> None:
        """Until the directory changes (or a moment passes); RequestError 503 after `end_s`."""
        left_s = end_s - self.clock.now_s()
        if left_s <= 0 or self._stopped:
            text = f"No decode replica became ready within {self.patience_s:g} s."
            raise RequestError(503, "server_error", None, text, "no_replica", retry_after_s=5.0)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left_s, 0.5)):
                await self._changed.wait()

    def _link(self, replica_id: str) -> None:
        name = f"{self.ingress_id}/{next(self._numbers)}"
        link = self._links[replica_id] = Link(name, self.connect(replica_id))
        for work in (self._read(link), self._keep_alive(link)):
            task = asyncio.create_task(work)
            link.tasks.append(task)
            # However one of them ends, nothing of this connection can be relied on any more.
            task.add_done_callback(lambda _: self._lost(replica_id, link))

    def _lost(self, replica_id: str, link: Link) -> None:
        """A connection has ended; the next directory makes another, if the replica still serves."""
        if self._links.get(replica_id) is link:
            self._drop(replica_id)

    def _drop(self, replica_id: str) -> None:
        """A replica is out: every record that it had goes on elsewhere."""
        link = self._links.pop(replica_id, None)
        if link is not None:
            for task in link.tasks:
                if not task.done():  # else an unexpected error of it would go unlogged
                    task.cancel()
        for record in self._records.values():
            if record.replica_id == replica_id:
                self._release(record)
                record.events.put_nowait(None)
        self._changed.set()

    async def _read(self, link: Link) -> None:
        """Take in a replica's messages until it is lost, or has given us up for silent."""
        with contextlib.suppress(ReplicaLost):
            async for message in link.client.tokens(link.name):
                for item in unpack(message):
                    self._take_in(item)

    async def _keep_alive(self, link: Link) -> None:
        """Let a replica know that somebody still reads what it makes, until it is lost."""
        with contextlib.suppress(ReplicaLost, TimeoutError):
            while True:
                await self.clock.sleep(PING_S)
                async with asyncio.timeout(ANSWER_S):
                    await link.client.ping(link.name)

    def _take_in(self, item: Output | Moved) -> None:
        record = self._placed.get(item.request_id)
        if record is None:
            return  # finished, given up, or resumed elsewhere meanwhile
        if isinstance(item, Moved):
            record.sequence.parked = item.parked
            self._release(record)
            record.events.put_nowait(None)
            return
        output = record.sequence.output
        known = max(len(output) - item.index, 0)
        fresh = item.delta.token_ids[known:]
        if not fresh and item.delta.finish is None:
            return  # delivered before
        assert item.index <= len(output), "a replica skipped a token"
        output.extend(fresh)
        record.futile_moves, record.sequence.cached_tokens = 0, item.delta.cached_tokens
        if record.expected_tokens is not None:
            self.guesses.found(record.expected_tokens, item.delta.cached_tokens)
            record.expected_tokens = None
        logprobs = item.delta.logprobs[known:]
        record.events.put_nowait(replace(item.delta, token_ids=tuple(fresh), logprobs=logprobs))
        self._last_token_s = self.clock.now_s()
        if item.delta.finish is not None:
            self._release(record)

    def _release(self, record: Record) -> None:
        """The record has no replica any more."""
        if record.replica_id is not None:
            self._load_tokens[record.replica_id] -= record.load_tokens
            if not self._load_tokens[record.replica_id]:
                del self._load_tokens[record.replica_id]
            del self._placed[record.call_id]
            record.replica_id = None

    def _forget(self, record: Record) -> None:
        """The consumer is done with a record: stop the work if it was not finished."""
        del self._records[record.sequence.request_id]
        link = self._links.get(record.replica_id or "")
        self._release(record)
        if not record.finished and link is not None:
            self._later(link.client.abort([record.call_id]))

    def _later(self, call: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            with contextlib.suppress(ReplicaLost):
                await call

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
