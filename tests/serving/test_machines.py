"""Replicas in worker processes: the tokens of a service in one process, whatever is killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from serve import build
from serve.clients import Draining, ReplicaLost
from serve.engine.sequence import Request
from serve.machines.channel import Channel, listen
from serve.machines.clients import Machines, socket_of
from serve.machines.launcher import MachineLauncher
from serve.machines.service import MachineService
from serve.machines.worker import Worker
from tests.models.tiny import write_byte_level
from tests.serving.tiny import (
    collect,
    mixed_requests,
    request,
    settings,
    slow,
    solo_tokens,
    until,
)

START_S = 60.0


@contextmanager
def machine(folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "serve.machines.worker", str(socket_of(folder, name))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("model")
    given = settings(prefill=0, kv_tokens=2048).model_dump()
    given["controller"]["period_s"] = 0.05
    given |= {"model": str(write_byte_level(folder / "tiny.gguf")), "data_dir": str(folder)}
    return Settings.model_validate(given)


@pytest.fixture(scope="module")
def model(chosen: Settings) -> build.Model:
    return build.load(chosen)


def of_model(requests: list[Request], model: build.Model) -> list[Request]:
    """Requests whose prompts and biases the small vocabulary has."""
    vocab = model.decoder.config.vocab
    return [r for r in requests if max(r.prompt) < vocab]


@asynccontextmanager
async def served(
    folder: Path, chosen: Settings, names: list[str]
) -> AsyncIterator[tuple[MachineService, dict[str, Any]]]:
    """A service with a replica on each of the machines, ready."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(machine(folder, name)) for name in names}
        await until(lambda: all(socket_of(folder, n).exists() for n in names), START_S)
        async with MachineService(chosen, folder) as service:
            await service.controller.place("decode", names)
            await until(lambda: len(ready(service)) == len(names), START_S)
            yield service, processes


def on(service: MachineService, name: str) -> str:
    """The replica on a machine."""
    entries = service.controller.directory().entries
    return next(e.replica_id for e in entries if e.replica_id.endswith(f".{name}"))


def under_way(service: MachineService, count: int) -> bool:
    """Whether so many long answers have begun."""
    records = service.ingress._records
    found = [r for name, r in records.items() if name.startswith("long")]
    return len(found) == count and all(len(r.sequence.output) > 5 for r in found)


def play(work: Coroutine[Any, Any, None]) -> None:
    """Processes take long to start on a busy machine."""

    async def guarded() -> None:
        async with asyncio.timeout(3 * START_S):
            await work

    asyncio.run(guarded())


def ready(service: MachineService) -> list[str]:
    return [entry.replica_id for entry in service.ingress.directory.ready("decode")]


def test_real_machines(tmp_path: Path, chosen: Settings, model: build.Model):
    """Killed, and hung until killed. One test, for a machine takes seconds of torch to start."""

    async def work() -> None:
        async with served(tmp_path, chosen, ["b", "c"]) as (service, processes):
            await a_killed_machine_is_not_noticed(service, model, processes["b"])
            await a_hung_machine_that_dies_is_lost(service, processes["c"])

    play(work())


def test_workers_in_this_process(tmp_path: Path, chosen: Settings, model: build.Model):
    """The same calls over the same sockets, without the wait for torch."""

    async def work() -> None:
        async with beside(tmp_path, chosen, ["a", "b"]) as (service, workers):
            await errors_cross_as_what_they_are(service, tmp_path)
            for worker in workers:
                for replica in worker._replicas.values():
                    slow(replica.result())
            await a_drained_machine_hands_its_pages_on(service, model)

    play(work())


@asynccontextmanager
async def beside(
    folder: Path, chosen: Settings, names: list[str]
) -> AsyncIterator[tuple[MachineService, list[Worker]]]:
    """As `served`, over workers of this process."""
    workers = {name: Worker(Machines(folder)) for name in names}
    servers = [await listen(socket_of(folder, name), worker) for name, worker in workers.items()]
    async with MachineService(chosen, folder) as service:
        await service.controller.place("decode", names)
        await until(lambda: len(ready(service)) == len(names), START_S)
        yield service, list(workers.values())
    for server, worker in zip(servers, workers.values(), strict=True):
        server.close()
        await worker.machines.close()


async def errors_cross_as_what_they_are(service: MachineService, folder: Path) -> None:
    known = ready(service)
    other = MachineLauncher(service.launcher.settings, folder)
    socket_of(folder, "gone").touch()
    assert await other.running() == dict.fromkeys(known, "decode")
    await other.close()
    with pytest.raises(ReplicaLost, match="decode-9 is not here"):
        await Channel(socket_of(folder, "a")).call("ping", replica_id="decode-9")
    with pytest.raises(ValueError, match="no call 'dance'"):
        await Channel(socket_of(folder, "a")).call("dance", replica_id=on(service, "a"))
    with pytest.raises(ReplicaLost, match="lease x has ended"):
        await service.launcher.connect_decode(on(service, "a")).export("x", 0)
    with pytest.raises(ValueError, match=r"prefill\.replicas = 0 is accepted"):
        await service.launcher.start("prefill", "prefill-1.a")


async def a_drained_machine_hands_its_pages_on(service: MachineService, model: build.Model) -> None:
    """Nothing is computed again, though the drain ends long before the answers would."""
    long = [request(f"long-{n}", [*range(10 + n, 40)], 200, ignore_eos=True) for n in range(2)]
    tasks = [asyncio.create_task(collect(service, one)) for one in long]
    await until(lambda: under_way(service, len(long)), START_S)
    client, was = service.launcher.connect_decode(on(service, "a")), on(service, "a")
    await service.controller.leave("a", 2.0)
    await until(lambda: was not in ready(service), START_S)
    with pytest.raises((Draining, ReplicaLost)):
        await client.submit(b"", "ingress-1")
    for one, task in zip(long, tasks, strict=True):
        assert await task == solo_tokens(model, one)
    await until(lambda: service.controller.directory().find(was) is None, START_S)
    [left] = [await service.launcher.ping(replica_id) for replica_id in ready(service)]
    assert left.migrated.requests == service.ingress.resumed == 1 and left.migrated.failed == 0
    assert left.migrated.tokens > 30 and left.stats.recomputed_tokens == 0
    gone = service.launcher.seen[was]
    assert gone.draining and gone.stats.running == 0 < gone.stats.generated_tokens


async def a_killed_machine_is_not_noticed(
    service: MachineService, model: build.Model, process: subprocess.Popen[bytes]
) -> None:
    requests = of_model(mixed_requests(8, seed=5), model)
    long = [request(f"long-{n}", [*range(20 + n, 50)], 80, ignore_eos=True) for n in range(4)]
    resumed = service.ingress.resumed
    tasks = [asyncio.create_task(collect(service, r)) for r in (*long, *requests)]
    await until(lambda: under_way(service, len(long)), START_S)
    process.kill()
    await service.controller.place("decode", ["c"])
    for one, task in zip((*long, *requests), tasks, strict=True):
        assert await task == solo_tokens(model, one)
    assert service.ingress.resumed > resumed
    assert ready(service) == [on(service, "c")]


async def a_hung_machine_that_dies_is_lost(
    service: MachineService, process: subprocess.Popen[bytes]
) -> None:
    client = service.launcher.connect_decode(on(service, "c"))
    os.kill(process.pid, signal.SIGSTOP)
    hung = asyncio.create_task(client.abort(["x"]))
    await asyncio.sleep(0.05)
    assert not hung.done()
    process.kill()
    with pytest.raises(ReplicaLost):
        await hung
