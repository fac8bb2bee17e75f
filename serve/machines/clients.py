"""Calls to replicas on machines, by whoever knows the folder of their sockets."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter

from serve.machines.channel import Channel
from serve.places import machine_of
from serve.state import ReplicaState

if TYPE_CHECKING:
    from serve.transport import Offer

_STATE = TypeAdapter(ReplicaState)


class Machines:
    """One connection to each machine of a folder, made when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._channels: dict[str, Channel] = {}

    def of(self, replica_id: str) -> Channel:
        """To the machine that a replica is on."""
        return self.to(machine_of(replica_id))

    def to(self, machine: str) -> Channel:
        if machine not in self._channels:
            self._channels[machine] = Channel(socket_of(self.folder, machine))
        return self._channels[machine]

    async def close(self) -> None:
        """Leave all."""
        for channel in self._channels.values():
            await channel.close()


class RemoteDecodeClient:
    """See serve.clients.DecodeClient and ParkingClient."""

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

    async def export(self, lease_id: str, skip_tokens: int) -> "Offer":
        from serve.transport import Offer

        given: dict[str, Any] = {"lease_id": lease_id, "skip_tokens": skip_tokens}
        answer = await self.channel.call("export", replica_id=self.replica_id, **given)
        return TypeAdapter(Offer).validate_python(answer.head["value"])

    async def acknowledge(self, lease_id: str) -> bool:
        given: dict[str, Any] = {"replica_id": self.replica_id, "lease_id": lease_id}
        return cast(bool, (await self.channel.call("acknowledge", **given)).head["value"])

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        given: dict[str, Any] = {"replica_id": self.replica_id, "ingress_id": ingress_id}
        return _STATE.validate_python((await self.channel.call("ping", **given)).head["value"])


def socket_of(folder: Path, machine: str) -> Path:
    """Where a machine answers."""
    return folder / f"{machine}.sock"
