"""The prefill replicas as a decode replica sees them: choose one, call it, try another if it dies.

Every call has a deadline and a named outcome; a call given up is followed by an abort, so that no
replica goes on working for nobody. Used by decode.py only.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from serve.clients import ConnectPrefill, PrefillClient, ReplicaLost
from serve.directory import Directory
from serve.engine.cost import StepCost
from serve.engine.sequence import Sequence
from serve.prefixes import PlacedPrefixes
from serve.route import cheapest
from serve.transport import HandoffLost, PrefillReply


class PrefillPeers:
    """Follows the directory; one client per ready prefill replica."""

    def __init__(
        self, connect: ConnectPrefill, *, prefixes: PlacedPrefixes, deadline_s: float
    ) -> None:
        """prefixes: what this decode replica had computed where; other callers' it cannot know."""
        self.connect = connect
        self.prefixes = prefixes
        self.deadline_s = deadline_s
        self._clients: dict[str, PrefillClient] = {}
        self._load_tokens: Counter[str] = Counter()
        self._lenders: dict[str, PrefillClient] = {}  # by lease, until it is acknowledged
        self._background: set[asyncio.Task[Any]] = set()

    def update(self, directory: Directory) -> None:
        """Take in a newer directory."""
        ready = {entry.replica_id for entry in directory.ready("prefill")}
        for replica_id in set(self._clients) - ready:
            del self._clients[replica_id]
            self.prefixes.forget(replica_id)
        for replica_id in ready - set(self._clients):
            self._clients[replica_id] = self.connect(replica_id)

    def any(self) -> bool:
        """Whether there is a prefill replica to ask."""
        return bool(self._clients)

    async def prefill(self, sequence: Sequence) -> PrefillReply | None:
        """The prompt's KV from `sequence.computed_tokens` on, on offer by some replica.

        The replica is the one that would be done first: what it computed for us before, it has
        cached. None when no replica could do it; the caller then computes the prompt itself.
        Whoever gets a reply acknowledges its lease in the end.
        """
        tokens = sequence.tokens(0, len(sequence))
        hashes = self.prefixes.hashes(sequence.request.cache_key, tokens)
        tried: set[str] = set()
        while True:
            candidates = [r for r in self._clients if r not in tried]
            cached = {r: self.prefixes.cached_tokens(r, hashes) for r in candidates}
            choice = cheapest(candidates, self._load_tokens, cached, len(tokens), StepCost())
            if choice is None:
                return None
            replica_id, load_tokens = choice.replica_id, round(choice.prefill_cost)
            tried.add(replica_id)
            self._load_tokens[replica_id] += load_tokens
            try:
                reply = await self._ask(replica_id, sequence, sequence.computed_tokens)
                self.prefixes.note(replica_id, hashes)
                return reply
            except (ReplicaLost, HandoffLost, TimeoutError, ValueError):
                continue  # gone, too slow or too small: the next one, or nobody
            finally:
                self._load_tokens[replica_id] -= load_tokens
                if not self._load_tokens[replica_id]:
                    del self._load_tokens[replica_id]

    def acknowledge(self, lease_id: str) -> None:
        """Tell the lender, without waiting, that its pages may be freed."""
        self._later(self._lenders.pop(lease_id).acknowledge(lease_id))

    async def _ask(self, replica_id: str, sequence: Sequence, skip: int) -> PrefillReply:
        client = self._clients[replica_id]
        try:
            async with asyncio.timeout(self.deadline_s):
                reply = await client.prefill(sequence.to_bytes(), skip)
        except (TimeoutError, asyncio.CancelledError):
            self._later(client.abort(sequence.request_id))
            raise
        except ReplicaLost:
            if self._clients.get(replica_id) is client:  # a later one of its name is another
                del self._clients[replica_id]
            raise
        self._lenders[reply.offer.lease_id] = client
        return reply

    def _later(self, call: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            with contextlib.suppress(ReplicaLost):
                await call

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
