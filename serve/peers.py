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
from serve.engine.sequence import Sequence
from serve.prefill import PrefillReply
from serve.route import least_loaded


class PrefillPeers:
    """Follows the directory; one client per ready prefill replica."""

    def __init__(self, connect: ConnectPrefill, *, deadline_s: float) -> None:
        self.connect = connect
        self.deadline_s = deadline_s
        self._clients: dict[str, PrefillClient] = {}
        self._load_tokens: Counter[str] = Counter()
        self._background: set[asyncio.Task[Any]] = set()

    def update(self, directory: Directory) -> None:
        """Take in a newer directory."""
        ready = {entry.replica_id for entry in directory.ready("prefill")}
        for replica_id in set(self._clients) - ready:
            del self._clients[replica_id]
        for replica_id in ready - set(self._clients):
            self._clients[replica_id] = self.connect(replica_id)

    def any(self) -> bool:
        """Whether there is a prefill replica to ask."""
        return bool(self._clients)

    async def prefill(self, sequence: Sequence) -> PrefillReply | None:
        """The prompt's KV from `sequence.computed_tokens` on, on offer by some replica.

        None when no replica could do it; the caller then computes the prompt itself.
        """
        payload, skip = sequence.to_bytes(), sequence.computed_tokens
        tried: set[str] = set()
        while True:
            candidates = [r for r in self._clients if r not in tried]
            replica_id = least_loaded(candidates, self._load_tokens)
            if replica_id is None:
                return None
            tried.add(replica_id)
            self._load_tokens[replica_id] += len(sequence) - skip
            try:
                return await self._ask(replica_id, sequence.request_id, payload, skip)
            except (ReplicaLost, TimeoutError, ValueError):
                continue  # gone, too slow or too small: the next one, or nobody
            finally:
                self._load_tokens[replica_id] -= len(sequence) - skip

    def acknowledge(self, lease_id: str) -> None:
        """Tell the lender, without waiting, that its pages may be freed."""
        replica_id = lease_id.rpartition("/")[0]
        client = self._clients.get(replica_id)
        if client is not None:  # else its leases died with it, or will expire
            self._later(client.acknowledge(lease_id))

    async def _ask(
        self, replica_id: str, request_id: str, payload: bytes, skip: int
    ) -> PrefillReply:
        client = self._clients[replica_id]
        try:
            return await asyncio.wait_for(client.prefill(payload, skip), self.deadline_s)
        except (TimeoutError, asyncio.CancelledError):
            self._later(client.abort(request_id))
            raise

    def _later(self, call: Coroutine[Any, Any, object]) -> None:
        async def run() -> None:
            with contextlib.suppress(ReplicaLost):
                await call

        task = asyncio.create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
