"""The Ray shells: one actor per replica, one for the controller, and the clients that call them.

Nothing is decided here. An actor builds the plain object, starts it on its event loop and passes
calls on; a client awaits a reply and turns a dead actor into ReplicaLost. Every actor is named and
detached: a controller that comes back after a crash finds the replicas it had.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cluster.clock import WallClock
from cluster.raylocal.actors import Needs, find, kill, list_named, start_named
from cluster.settings import RoleSettings, Settings
from serve.clients import ReplicaLost
from serve.controller import Controller, Patience
from serve.directory import Directory
from serve.follow import follow
from serve.kv import shared
from serve.places import MACHINE_LABEL, machine_of
from serve.state import ReplicaState, Role

if TYPE_CHECKING:  # the ingress and the controller run this file without torch
    from serve.decode import DecodeReplica
    from serve.prefill import PrefillReplica
    from serve.transport import Offer, PrefillReply

CONTROLLER = "controller"
REPLICA_PREFIX = "replica/"
T = TypeVar("T")


async def reply(reference: Awaitable[T]) -> T:
    """An actor's answer. ReplicaLost when the actor is dead or out of reach; an exception of the
    actor's own code comes through as what it is."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return await reference
    except RayTaskError:
        raise
    except RayError as error:
        raise ReplicaLost(str(error).partition("\n")[0]) from error


def compute_threads(settings: Settings, role: RoleSettings) -> int:
    """How many threads a replica computes with, at least one.

    Unless set: in our own Ray an equal share of this machine's CPUs, for replicas that compete for
    cores wait for each other's threads at every operation (on two cores, two replicas of two
    threads each took ten times as long for a step as with one each). On a cluster, what Ray
    reserved for it.
    """
    if role.threads:
        return role.threads
    if settings.ray.address == "local":
        replicas = settings.prefill.replicas + settings.decode.replicas
        return max(1, len(os.sched_getaffinity(0)) // replicas)
    return max(1, int(role.cpus))


def segment_prefix(run_id: str) -> str:
    """What the shared memory of one run's replicas is called; `down` sweeps by it."""
    return f"sanderling-{run_id}-"


class _Shell:
    """What both replica actors do around their plain replica."""

    def __init__(self, settings_json: str, run_id: str, replica_id: str) -> None:
        import torch

        from serve import build

        self.settings = Settings.model_validate_json(settings_json)
        self.run_id = run_id
        self.replica_id = replica_id
        torch.set_num_threads(compute_threads(self.settings, self._role()))
        self.model = build.load(self.settings)
        self.replica: Any = self._build()
        self._starting = asyncio.Lock()
        self._started = False

    def _role(self) -> RoleSettings:
        raise AssertionError("each actor says its role")

    def _build(self) -> Any:
        raise AssertionError("each actor builds its replica")

    async def _start(self) -> None:
        """Start on the actor's event loop, which does not run yet in __init__."""
        async with self._starting:
            if not self._started:
                await self.replica.start()
                self._started = True

    async def drain(self, deadline_s: float) -> int:
        return cast(int, await self.replica.drain(deadline_s))

    async def stop(self) -> None:
        await self.replica.stop()


class PrefillActor(_Shell):
    """See PrefillReplica."""

    replica: "PrefillReplica"

    def _role(self) -> RoleSettings:
        return self.settings.prefill

    def _build(self) -> "PrefillReplica":
        from serve import build

        segment = segment_prefix(self.run_id) + self.replica_id
        return build.prefill_replica(
            self.settings, self.model, self.replica_id, segment, WallClock()
        )

    async def ping(self) -> ReplicaState:
        await self._start()
        return await self.replica.ping()

    async def prefill(self, payload: bytes, skip_tokens: int) -> "PrefillReply":
        await self._start()
        return await self.replica.prefill(payload, skip_tokens)

    async def acknowledge(self, lease_id: str) -> bool:
        return await self.replica.acknowledge(lease_id)

    async def abort(self, request_id: str) -> bool:
        return await self.replica.abort(request_id)


class DecodeActor(_Shell):
    """See DecodeReplica; it also follows the directory to know the other replicas."""

    replica: "DecodeReplica"

    def _role(self) -> RoleSettings:
        return self.settings.decode

    def _build(self) -> "DecodeReplica":
        from serve import build

        segment = segment_prefix(self.run_id) + self.replica_id
        connect = build.Connect(RayPrefillClient, RayDecodeClient)
        return build.decode_replica(
            self.settings, self.model, self.replica_id, segment, connect, WallClock()
        )

    async def _start(self) -> None:
        first = not self._started
        await super()._start()
        if first:
            update = self.replica.update
            self._follower = asyncio.create_task(follow(watch, update, WallClock()))

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        await self._start()
        return await self.replica.ping(ingress_id)

    async def submit(self, payload: bytes, ingress_id: str) -> None:
        await self._start()
        await self.replica.submit(payload, ingress_id)

    async def abort(self, request_ids: list[str]) -> int:
        return await self.replica.abort(request_ids)

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        await self._start()
        async for message in self.replica.tokens(ingress_id):
            yield message

    async def export(self, lease_id: str, skip_tokens: int) -> "Offer":
        return await self.replica.export(lease_id, skip_tokens)

    async def acknowledge(self, lease_id: str) -> bool:
        return await self.replica.acknowledge(lease_id)


class ControllerActor:
    """See Controller. Ray restarts it when it crashes; it then finds its replicas by name."""

    def __init__(self, settings_json: str, run_id: str) -> None:
        settings = Settings.model_validate_json(settings_json)
        self.controller = Controller(
            RayLauncher(settings, settings_json, run_id),
            {"prefill": settings.prefill.replicas, "decode": settings.decode.replicas},
            Patience(**settings.controller.model_dump()),
            WallClock(),
        )
        self._starting = asyncio.Lock()
        self._started = False

    async def _start(self) -> None:
        async with self._starting:
            if not self._started:
                await self.controller.start()
                self._started = True

    async def watch(self, version: int, timeout_s: float) -> Directory:
        await self._start()
        return await self.controller.watch(version, timeout_s)

    async def scale(self, role: Role, replicas: int, deadline_s: float) -> None:
        await self.controller.scale(role, replicas, deadline_s)

    async def place(self, role: Role, machines: list[str], drain_s: float) -> None:
        await self.controller.place(role, machines, drain_s)

    async def leave(self, machine: str, deadline_s: float) -> None:
        await self.controller.leave(machine, deadline_s)

    async def drain(self, replica_id: str, deadline_s: float) -> None:
        await self.controller.drain(replica_id, deadline_s)

    async def close(self) -> None:
        self.controller.close()

    async def stop(self) -> None:
        await self.controller.stop()


class RayPlacing:
    """See serve.placing.Placing."""

    async def place(self, role: str, machines: list[str], drain_s: float) -> None:
        await reply(_handle(CONTROLLER).place.remote(role, machines, drain_s))

    async def leave(self, machine: str, deadline_s: float) -> None:
        await reply(_handle(CONTROLLER).leave.remote(machine, deadline_s))


async def watch(version: int, timeout_s: float) -> Directory:
    """Ask the controller actor; ReplicaLost while it is away."""
    return cast(Directory, await reply(_handle(CONTROLLER).watch.remote(version, timeout_s)))


class RayPrefillClient:
    """See serve.clients.PrefillClient."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self._actor: Any = None

    @property
    def actor(self) -> Any:
        if self._actor is None:
            self._actor = _handle(REPLICA_PREFIX + self.replica_id)
        return self._actor

    async def prefill(self, payload: bytes, skip_tokens: int) -> "PrefillReply":
        return cast("PrefillReply", await reply(self.actor.prefill.remote(payload, skip_tokens)))

    async def acknowledge(self, lease_id: str) -> bool:
        return cast(bool, await reply(self.actor.acknowledge.remote(lease_id)))

    async def abort(self, request_id: str) -> bool:
        return cast(bool, await reply(self.actor.abort.remote(request_id)))


class RayDecodeClient:
    """See serve.clients.DecodeClient and ParkingClient."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self._actor: Any = None

    @property
    def actor(self) -> Any:
        if self._actor is None:
            self._actor = _handle(REPLICA_PREFIX + self.replica_id)
        return self._actor

    async def submit(self, payload: bytes, ingress_id: str) -> None:
        await reply(self.actor.submit.remote(payload, ingress_id))

    async def abort(self, request_ids: list[str]) -> int:
        return cast(int, await reply(self.actor.abort.remote(request_ids)))

    async def tokens(self, ingress_id: str) -> AsyncIterator[bytes]:
        stream = self.actor.tokens.options(num_returns="streaming").remote(ingress_id)
        while True:
            reference = await reply(anext(stream))
            yield cast(bytes, await reply(reference))

    async def export(self, lease_id: str, skip_tokens: int) -> "Offer":
        return cast("Offer", await reply(self.actor.export.remote(lease_id, skip_tokens)))

    async def acknowledge(self, lease_id: str) -> bool:
        return cast(bool, await reply(self.actor.acknowledge.remote(lease_id)))

    async def ping(self, ingress_id: str | None = None) -> ReplicaState:
        return cast(ReplicaState, await reply(self.actor.ping.remote(ingress_id)))


class RayLauncher:
    """See serve.controller.Launcher: replicas as named, detached actors."""

    def __init__(self, settings: Settings, settings_json: str, run_id: str) -> None:
        self.settings = settings
        self.settings_json = settings_json
        self.run_id = run_id

    async def start(self, role: Role, replica_id: str) -> None:
        chosen = self.settings.prefill if role == "prefill" else self.settings.decode
        machine = machine_of(replica_id)
        labels = {**chosen.labels, MACHINE_LABEL: machine} if machine else chosen.labels
        start_named(
            PrefillActor if role == "prefill" else DecodeActor,
            REPLICA_PREFIX + replica_id,
            self.settings_json,
            self.run_id,
            replica_id,
            needs=Needs(chosen.cpus, chosen.memory_bytes, labels),
        )

    async def ping(self, replica_id: str) -> ReplicaState:
        actor = _handle(REPLICA_PREFIX + replica_id)
        return cast(ReplicaState, await reply(actor.ping.remote()))

    async def drain(self, replica_id: str, deadline_s: float) -> int:
        actor = _handle(REPLICA_PREFIX + replica_id)
        return cast(int, await reply(actor.drain.remote(deadline_s)))

    async def stop(self, replica_id: str) -> None:
        kill(REPLICA_PREFIX + replica_id)
        shared.unlink(segment_prefix(self.run_id) + replica_id)

    async def running(self) -> Mapping[str, Role]:
        names = [name.removeprefix(REPLICA_PREFIX) for name in list_named(REPLICA_PREFIX)]
        return {n: "prefill" if n.startswith("prefill-") else "decode" for n in names}


def _handle(name: str) -> Any:
    """The actor of that name; ReplicaLost when there is none."""
    actor = find(name)
    if actor is None:
        raise ReplicaLost(f"no actor is called {name}")
    return actor
