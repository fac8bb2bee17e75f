"""Replicas on machines that are worker processes: the controller's launcher and the ingress's
clients, both over one connection to each machine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

from cluster.settings import Settings
from serve.clients import ReplicaLost
from serve.engine.stats import EngineStats
from serve.machines.channel import Channel
from serve.places import machine_of
from serve.state import ReplicaState, Role

ANSWER_S = 5.0  # for a machine to take an order that needs no work of it


class RemoteDecodeClient:
    """See serve.clients.DecodeClient."""

    def __init__(self, channel: Channel, replica_id: str) -> None:
        self.channel = channel
        self.replica_id = replica_id

    async def submit(self, payload: bytes, ingress_id: str) -> None:
        await self.channel.call(
            "submit", payload, replica_id=self.replica_id, ingress_id=ingress_id
        )

    async def abort(self, request_ids: list[str]) -> int:
        given: dict[str, Any] = {"replica_id": self.replica_id, "request_ids": request_ids}
        return cast(int, (await self.channel.call("abort", **given)).head["value"])

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        given: dict[str, Any] = {"replica_id": self.replica_id, "ingress_id": ingress_id}
        async with contextlib.aclosing(self.channel.stream("tokens", **given)) as items:
            async for item in items:
                yield item

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        given: dict[str, Any] = {"replica_id": self.replica_id, "ingress_id": ingress_id}
        return _state((await self.channel.call("ping", **given)).head["value"])


class MachineLauncher:
    """See serve.controller.Launcher. `folder` holds one socket for each machine, named by it.

    seen: the last state of every replica there was, also of those that are gone.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.seen: dict[str, ReplicaState] = {}
        self._channels: dict[str, Channel] = {}

    async def start(self, role: Role, replica_id: str) -> None:
        if role != "decode":
            raise ValueError(
                "a machine without Ray takes replicas of decode only, which compute prompts too: "
                "prefill.replicas = 0 is accepted here"
            )
        settings = self.settings.model_dump_json().encode()
        async with asyncio.timeout(ANSWER_S):
            await self._channel(replica_id).call("start", settings, replica_id=replica_id)

    async def ping(self, replica_id: str) -> ReplicaState:
        state = await self.connect_decode(replica_id).ping()
        self.seen[replica_id] = state
        return state

    async def drain(self, replica_id: str, deadline_s: float) -> int:
        given: dict[str, Any] = {"replica_id": replica_id, "deadline_s": deadline_s}
        moved = (await self._channel(replica_id).call("drain", **given)).head["value"]
        await self.ping(replica_id)  # what it had counted in the end
        return cast(int, moved)

    async def stop(self, replica_id: str) -> None:
        with contextlib.suppress(ReplicaLost):  # the machine is gone, and so is the replica
            await self._channel(replica_id).call("stop", replica_id=replica_id)

    async def running(self) -> Mapping[str, Role]:
        found: list[str] = []
        for socket in sorted(self.folder.glob("*.sock")):
            with contextlib.suppress(ReplicaLost, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    found += (await self._to(socket.stem).call("running")).head["value"]
        return dict.fromkeys(found, "decode")

    def connect_decode(self, replica_id: str) -> RemoteDecodeClient:
        """Connecting always works; calls may fail."""
        return RemoteDecodeClient(self._channel(replica_id), replica_id)

    async def close(self) -> None:
        """Leave all machines."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, replica_id: str) -> Channel:
        return self._to(machine_of(replica_id))

    def _to(self, machine: str) -> Channel:
        if machine not in self._channels:
            self._channels[machine] = Channel(socket_of(self.folder, machine))
        return self._channels[machine]


def socket_of(folder: Path, machine: str) -> Path:
    """Where a machine answers."""
    return folder / f"{machine}.sock"


def _state(value: dict[str, Any]) -> ReplicaState:
    return ReplicaState(**{**value, "stats": EngineStats(**value["stats"])})
