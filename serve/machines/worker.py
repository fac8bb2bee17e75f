"""`python -m serve.machines.worker SOCKET`: a process that is a machine, and the replicas on it.

It answers as soon as it could start a replica (torch is imported by then) and lives until it is
killed. Several replicas on it share the process's weights and threads.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.clock import WallClock
from cluster.settings import Settings
from serve.clients import ReplicaLost
from serve.directory import Directory, Entry
from serve.machines.channel import Frame, listen
from serve.machines.clients import Machines, RemoteDecodeClient

if TYPE_CHECKING:
    from serve.build import Model
    from serve.decode import DecodeReplica

THREADS = 1  # processes of one machine that compete for its cores slow each other down


class Worker:
    """See channel.Served. Every call but `running` and `update` names a replica.

    machines: how replicas here reach those on other machines, to take over what they parked.
    """

    streams = frozenset({"tokens"})

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        self._directory = Directory()
        self._replicas: dict[str, asyncio.Task[DecodeReplica]] = {}
        self._models: dict[str, asyncio.Task[Model]] = {}

    async def answer(self, name: str, arguments: dict[str, Any], blob: bytes) -> Frame:
        if name == "running":
            return Frame({"value": sorted(self._replicas)})
        if name == "update":
            self._update(**arguments)
            return Frame({"value": None})
        replica_id = arguments.pop("replica_id")
        if name == "start":
            self._start(replica_id, arguments["segment"], Settings.model_validate_json(blob))
            return Frame({"value": None})
        if name == "stop":
            await self._stop(replica_id)
            return Frame({"value": None})
        return await _ask(await self._find(replica_id), name, arguments, blob)

    async def items(self, name: str, arguments: dict[str, Any]) -> AsyncIterator[bytes]:
        replica = await self._find(arguments["replica_id"])
        async for message in replica.tokens(arguments["ingress_id"]):
            yield message

    def _update(self, version: int, entries: list[list[Any]]) -> None:
        """Take in who serves; replicas that are not there yet hear of it when they are."""
        self._directory = Directory(version, tuple(Entry(*entry) for entry in entries))
        for building in self._replicas.values():
            if building.done() and not building.cancelled() and building.exception() is None:
                building.result().update(self._directory)

    def _start(self, replica_id: str, segment: str, settings: Settings) -> None:
        """Begin; whoever asks the replica something waits for it. Idempotent."""
        if replica_id not in self._replicas:
            building = self._build(replica_id, segment, settings)
            self._replicas[replica_id] = asyncio.create_task(building)

    async def _build(self, replica_id: str, segment: str, settings: Settings) -> "DecodeReplica":
        from serve import build

        def prefill(prefill_id: str) -> Any:
            raise ValueError(f"a machine without Ray reaches no prefill replica ({prefill_id})")

        def parking(other_id: str) -> RemoteDecodeClient:
            return RemoteDecodeClient(self.machines.of(other_id), other_id)

        key = settings.model_dump_json()
        if key not in self._models:
            load = asyncio.to_thread(build.load, settings)
            self._models[key] = asyncio.create_task(load)
        model = await asyncio.shield(self._models[key])
        connect = build.Connect(prefill, parking)
        replica = build.decode_replica(settings, model, replica_id, segment, connect, WallClock())
        await replica.start()
        replica.update(self._directory)
        return replica

    async def _find(self, replica_id: str) -> "DecodeReplica":
        if replica_id not in self._replicas:
            raise ReplicaLost(f"{replica_id} is not here")
        return await asyncio.shield(self._replicas[replica_id])

    async def _stop(self, replica_id: str) -> None:
        starting = self._replicas.pop(replica_id, None)
        if starting is None:
            return
        starting.cancel()
        [built] = await asyncio.gather(starting, return_exceptions=True)
        if not isinstance(built, BaseException):
            await built.stop()


async def _ask(
    replica: "DecodeReplica", name: str, arguments: dict[str, Any], blob: bytes
) -> Frame:
    """One call of a replica. ReplicaLost also for what it has parked no more."""
    from serve.transport import HandoffLost

    if name == "submit":
        await replica.submit(blob, **arguments)
        return Frame({"value": None})
    if name == "ping":
        return Frame({"value": asdict(await replica.ping(**arguments))})
    if name == "export":
        try:
            offer = await replica.export(**arguments)
        except HandoffLost as error:
            raise ReplicaLost(str(error)) from error
        if offer.payload is not None:
            raise ValueError("KV crosses between machines by shared memory only, not by value")
        return Frame({"value": asdict(offer)})
    if name in ("abort", "drain", "acknowledge"):
        return Frame({"value": await getattr(replica, name)(**arguments)})
    raise ValueError(f"a machine knows no call {name!r}")


async def serve(path: Path) -> None:
    """Until killed."""
    server = await listen(path, Worker(Machines(path.parent)))
    async with server:
        await server.serve_forever()


def main(path: Path) -> None:
    import torch

    from serve import build  # a machine that answers need not import it any more

    assert build
    torch.set_num_threads(THREADS)
    path.unlink(missing_ok=True)
    asyncio.run(serve(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
