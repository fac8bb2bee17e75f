"""The controller's launcher over machines that are worker processes."""

import asyncio
import contextlib
import hashlib
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, cast

from cluster.settings import Settings
from serve.clients import ReplicaLost
from serve.directory import Directory
from serve.kv import shared
from serve.machines.clients import Machines, RemoteDecodeClient
from serve.state import ReplicaState, Role

ANSWER_S = 5.0  # for a machine to take an order that needs no work of it


class MachineLauncher:
    """See serve.controller.Launcher. `folder` holds one socket for each machine, named by it.

    seen: the last state of every replica there was, also of those that are gone.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.machines = Machines(folder)
        self.seen: dict[str, ReplicaState] = {}
        self._told: tuple[tuple[str, str, str], ...] = ()
        self._background: set[asyncio.Task[None]] = set()

    async def start(self, role: Role, replica_id: str) -> None:
        if role != "decode":
            raise ValueError(
                "a machine without Ray takes replicas of decode only, which compute prompts too: "
                "prefill.replicas = 0 is accepted here"
            )
        settings = self.settings.model_dump_json().encode()
        segment = self._segment(replica_id)
        async with asyncio.timeout(ANSWER_S):
            await self.machines.of(replica_id).call(
                "start", settings, replica_id=replica_id, segment=segment
            )

    async def ping(self, replica_id: str) -> ReplicaState:
        state = await self.connect_decode(replica_id).ping()
        self.seen[replica_id] = state
        return state

    async def drain(self, replica_id: str, deadline_s: float) -> int:
        given: dict[str, Any] = {"replica_id": replica_id, "deadline_s": deadline_s}
        moved = (await self.machines.of(replica_id).call("drain", **given)).head["value"]
        await self.ping(replica_id)  # what it had counted in the end
        return cast(int, moved)

    async def stop(self, replica_id: str) -> None:
        with contextlib.suppress(ReplicaLost):  # the machine is gone, and so is the replica
            await self.machines.of(replica_id).call("stop", replica_id=replica_id)
        shared.unlink(self._segment(replica_id))

    async def running(self) -> Mapping[str, Role]:
        found: list[str] = []
        for socket in sorted(self.folder.glob("*.sock")):
            with contextlib.suppress(ReplicaLost, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    found += (await self.machines.to(socket.stem).call("running")).head["value"]
        return dict.fromkeys(found, "decode")

    def update(self, directory: Directory) -> None:
        """Tell the machines who serves, when that has changed: replicas that drain need to know
        whether somebody is there to take over."""
        entries = tuple((e.replica_id, e.role, e.phase) for e in directory.entries)
        if entries == self._told:
            return
        self._told = entries
        for replica_id, _, _ in entries:
            given: dict[str, Any] = {"version": directory.version, "entries": entries}
            self._later(self._tell(replica_id, given))

    def connect_decode(self, replica_id: str) -> RemoteDecodeClient:
        """Connecting always works; calls may fail."""
        return RemoteDecodeClient(self.machines.of(replica_id), replica_id)

    async def close(self) -> None:
        """Leave all machines."""
        for task in self._background:
            task.cancel()
        await self.machines.close()
        shared.sweep(self._segment(""))

    async def _tell(self, replica_id: str, given: dict[str, Any]) -> None:
        with contextlib.suppress(ReplicaLost, TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await self.machines.of(replica_id).call("update", **given)

    def _segment(self, replica_id: str) -> str:
        """The shared memory of a replica, known again by whoever comes back to this folder."""
        mark = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:8]
        return f"sanderling-{mark}-{replica_id}"

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
