"""How one part of the service calls another: protocols that the Ray shells and the one-process
mode both fulfil, and the two errors that mean "ask another"."""

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

from serve.state import ReplicaState

if TYPE_CHECKING:
    from serve.transport import Offer, PrefillReply


class ReplicaLost(Exception):
    """The replica died or cannot be reached; whatever it was doing for the caller is undone."""


class Draining(Exception):
    """The replica takes no new requests; the caller routes elsewhere."""


class PrefillClient(Protocol):
    """A prefill replica seen from a decode replica. See PrefillReplica for the contracts."""

    async def prefill(self, payload: bytes, skip_tokens: int) -> "PrefillReply": ...

    async def acknowledge(self, lease_id: str) -> bool: ...

    async def abort(self, request_id: str) -> bool: ...


class DecodeClient(Protocol):
    """A decode replica seen from an ingress. See DecodeReplica for the contracts."""

    async def submit(self, payload: bytes, ingress_id: str) -> None: ...

    async def abort(self, request_ids: list[str]) -> int: ...

    def tokens(self, ingress_id: str) -> AsyncIterator[bytes]: ...

    async def ping(self, ingress_id: str | None = None) -> ReplicaState: ...


class ParkingClient(Protocol):
    """A decode replica that drains, seen from the one that takes a sequence over. See Parking."""

    async def export(self, lease_id: str, skip_tokens: int) -> "Offer": ...

    async def acknowledge(self, lease_id: str) -> bool: ...


ConnectPrefill = Callable[[str], PrefillClient]
ConnectDecode = Callable[[str], DecodeClient]
ConnectParking = Callable[[str], ParkingClient]
