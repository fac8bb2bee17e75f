"""The whole service in one process, without Ray: the same plain classes, wired by direct calls.

For tests and for embedding. `LocalLauncher.kill` loses a replica as SIGKILL would: calls under way
fail with ReplicaLost and nothing of it is heard again.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from cluster.clock import Clock, WallClock
from cluster.settings import Settings
from serve import build
from serve.clients import ReplicaLost
from serve.decode import DecodeReplica
from serve.directory import Directory
from serve.in_process import InProcessService
from serve.prefill import PrefillReplica
from serve.state import ReplicaState, Role
from serve.transport import Offer, PrefillReply

T = TypeVar("T")
PATIENCE_S = 60.0  # for a replica to take a request


@dataclass
class _Member:
    """A replica of this process and whether it was lost."""

    role: Role
    replica: PrefillReplica | DecodeReplica
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a call unless the replica is lost first."""
        if self.dead.is_set():
            work.close()
            raise ReplicaLost(f"{self.replica.replica_id} was killed")
        task = asyncio.ensure_future(work)
        death = asyncio.ensure_future(self.dead.wait())
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise ReplicaLost(f"{self.replica.replica_id} was killed")
            return task.result()
        finally:
            death.cancel()
            task.cancel()


@dataclass
class LocalPrefillClient:
    """See serve.clients.PrefillClient. `find` gives the replica, or raises ReplicaLost."""

    find: Callable[[], _Member]

    async def prefill(self, payload: bytes, skip_tokens: int) -> PrefillReply:
        member, replica = self._reach()
        return await member.call(replica.prefill(payload, skip_tokens))

    async def acknowledge(self, lease_id: str) -> bool:
        member, replica = self._reach()
        return await member.call(replica.acknowledge(lease_id))

    async def abort(self, request_id: str) -> bool:
        member, replica = self._reach()
        return await member.call(replica.abort(request_id))

    def _reach(self) -> tuple[_Member, PrefillReplica]:
        member = self.find()
        assert isinstance(member.replica, PrefillReplica)
        return member, member.replica


@dataclass
class LocalDecodeClient:
    """See serve.clients.DecodeClient and ParkingClient. `find` as above."""

    find: Callable[[], _Member]

    async def submit(self, payload: bytes, ingress_id: str) -> None:
        member, replica = self._reach()
        await member.call(replica.submit(payload, ingress_id))

    async def abort(self, request_ids: list[str]) -> int:
        member, replica = self._reach()
        return await member.call(replica.abort(request_ids))

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        member, replica = self._reach()
        messages = replica.tokens(ingress_id)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield await member.call(_next(messages))

    async def export(self, lease_id: str, skip_tokens: int) -> Offer:
        member, replica = self._reach()
        return await member.call(replica.export(lease_id, skip_tokens))

    async def acknowledge(self, lease_id: str) -> bool:
        member, replica = self._reach()
        return await member.call(replica.acknowledge(lease_id))

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        member, replica = self._reach()
        return await member.call(replica.ping(ingress_id))

    def _reach(self) -> tuple[_Member, DecodeReplica]:
        member = self.find()
        assert isinstance(member.replica, DecodeReplica)
        return member, member.replica


async def _next(messages: AsyncIterator[bytes]) -> bytes:
    return await anext(messages)


class LocalLauncher:
    """See serve.controller.Launcher."""

    def __init__(self, settings: Settings, model: build.Model, clock: Clock) -> None:
        self.settings = settings
        self.model = model
        self.clock = clock
        self.directory = Directory()
        self.members: dict[str, _Member] = {}

    async def start(self, role: Role, replica_id: str) -> None:
        replica: PrefillReplica | DecodeReplica
        segment = f"sanderling-{os.getpid()}-{id(self):x}-{replica_id}"
        if role == "prefill":
            replica = build.prefill_replica(
                self.settings, self.model, replica_id, segment, self.clock
            )
        else:
            connect = build.Connect(
                partial(self.connect_prefill, caller_id=replica_id),
                partial(self.connect_parking, caller_id=replica_id),
            )
            replica = build.decode_replica(
                self.settings, self.model, replica_id, segment, connect, self.clock
            )
            replica.update(self.directory)
        await replica.start()
        self.members[replica_id] = _Member(role, replica)

    async def ping(self, replica_id: str) -> ReplicaState:
        member = self._find(replica_id)
        return await member.call(member.replica.ping())

    async def drain(self, replica_id: str, deadline_s: float) -> int:
        member = self._find(replica_id)
        return await member.call(member.replica.drain(deadline_s))

    async def stop(self, replica_id: str) -> None:
        member = self.members.pop(replica_id, None)
        if member is not None:
            member.dead.set()
            await member.replica.stop()

    async def running(self) -> Mapping[str, Role]:
        return {replica_id: member.role for replica_id, member in self.members.items()}

    def kill(self, replica_id: str) -> None:
        """Lose a replica at once, whatever it was doing; it can call nobody any more either."""
        self._find(replica_id).dead.set()

    def connect_prefill(self, replica_id: str, caller_id: str) -> LocalPrefillClient:
        """For the decode replica `caller_id`. Connecting always works; calls may fail."""
        return LocalPrefillClient(partial(self._find_for, caller_id, replica_id))

    def connect_parking(self, replica_id: str, caller_id: str) -> LocalDecodeClient:
        """As connect_prefill, to a decode replica that parks what the caller takes over."""
        return LocalDecodeClient(partial(self._find_for, caller_id, replica_id))

    def connect_decode(self, replica_id: str) -> LocalDecodeClient:
        """Connecting always works; calls may fail."""
        return LocalDecodeClient(partial(self._find, replica_id))

    def update(self, directory: Directory) -> None:
        """Pass a newer directory on to the decode replicas."""
        self.directory = directory
        for member in self.members.values():
            if isinstance(member.replica, DecodeReplica):
                member.replica.update(directory)

    def _find_for(self, caller_id: str, replica_id: str) -> _Member:
        if self._find(caller_id).dead.is_set():
            raise ReplicaLost(f"the caller {caller_id} was killed")
        return self._find(replica_id)

    def _find(self, replica_id: str) -> _Member:
        if replica_id not in self.members:
            raise ReplicaLost(f"{replica_id} is gone")
        return self.members[replica_id]


class LocalService(InProcessService):
    """Controller, replicas and ingress on the running event loop; `ingress` is the Service."""

    def __init__(self, settings: Settings, model: build.Model, clock: Clock | None = None) -> None:
        clock = clock or WallClock()
        self.launcher = LocalLauncher(settings, model, clock)
        wanted: dict[Role, int] = {
            "prefill": settings.prefill.replicas,
            "decode": settings.decode.replicas,
        }
        super().__init__(settings, self.launcher, wanted, PATIENCE_S, clock)
