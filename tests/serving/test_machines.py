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
from serve.machines.channel import Channel
from serve.machines.clients import socket_of
from serve.machines.launcher import MachineLauncher
from serve.machines.service import MachineService
from serve.record import Record
from tests.models.tiny import write_byte_level
from tests.serving.tiny import collect, mixed_requests, request, settings, solo_tokens, until

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


def under_way(records: dict[str, Record], count: int) -> bool:
    """Whether so many long answers have begun."""
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


def test_tokens_are_those_of_one_process_whatever_is_killed(
    tmp_path: Path, chosen: Settings, model: build.Model
):
    """One machine is killed under load; no request notices."""
    requests = of_model(mixed_requests(16, seed=5), model)
    long = [request(f"long-{n}", [*range(10 + n, 40)], 120, ignore_eos=True) for n in range(4)]

    async def work() -> None:
        async with served(tmp_path, chosen, ["a", "b"]) as (service, processes):
            tasks = [asyncio.create_task(collect(service, r)) for r in (*long, *requests)]
            records = service.ingress._records
            await until(lambda: under_way(records, len(long)), START_S)
            processes["a"].kill()
            await service.controller.place("decode", ["b"])
            made = await asyncio.gather(*tasks)
            assert service.ingress.resumed > 0
            for one, tokens in zip((*long, *requests), made, strict=True):
                assert tokens == solo_tokens(model, one)
            assert [name.split(".")[1] for name in ready(service)] == ["b"]

    play(work())


def test_what_a_drained_machine_has_goes_on_elsewhere_with_its_pages(
    tmp_path: Path, chosen: Settings, model: build.Model
):
    """Nothing is computed again, though the two share no process and the drain has no time to
    wait for an end."""
    long = [request(f"long-{n}", [*range(10 + n, 40)], 200, ignore_eos=True) for n in range(2)]

    async def work() -> None:
        async with served(tmp_path, chosen, ["a", "b"]) as (service, _):
            tasks = [asyncio.create_task(collect(service, one)) for one in long]
            records = service.ingress._records
            await until(lambda: under_way(records, len(long)), START_S)
            await service.controller.leave("a", 0.5)
            made = await asyncio.gather(*tasks)
            for one, tokens in zip(long, made, strict=True):
                assert tokens == solo_tokens(model, one)
            await until(lambda: [name.split(".")[1] for name in ready(service)] == ["b"])
            seen = {name.split(".")[1]: state for name, state in service.launcher.seen.items()}
            assert seen["a"].draining and not seen["a"].stats.running
            await service.launcher.ping(ready(service)[0])
            seen = {name.split(".")[1]: state for name, state in service.launcher.seen.items()}
            assert seen["b"].migrated.requests == service.ingress.resumed == 1
            assert seen["b"].migrated.tokens > 30 and seen["b"].migrated.failed == 0
            assert seen["b"].stats.recomputed_tokens == 0

    play(work())


def test_replicas_are_found_again_and_errors_cross(tmp_path: Path, chosen: Settings):
    async def work() -> None:
        async with served(tmp_path, chosen, ["a"]) as (service, processes):
            [known] = ready(service)
            client = service.launcher.connect_decode(known)
            other = MachineLauncher(chosen, tmp_path)
            socket_of(tmp_path, "gone").touch()
            assert await other.running() == {known: "decode"}
            await other.close()
            with pytest.raises(ReplicaLost, match="decode-9 is not here"):
                await Channel(socket_of(tmp_path, "a")).call("ping", replica_id="decode-9")
            with pytest.raises(ValueError, match="no call 'dance'"):
                await Channel(socket_of(tmp_path, "a")).call("dance", replica_id=known)
            with pytest.raises(ReplicaLost, match="cannot be reached"):
                await Channel(socket_of(tmp_path, "z")).call("running")
            with pytest.raises(ValueError, match=r"prefill\.replicas = 0 is accepted"):
                await service.launcher.start("prefill", "prefill-1.a")
            await service.launcher.drain(known, 0.0)
            with pytest.raises(Draining):
                await client.submit(b"", "ingress-1")
            os.kill(processes["a"].pid, signal.SIGSTOP)
            hung = asyncio.create_task(client.abort(["x"]))
            await asyncio.sleep(0.05)
            processes["a"].kill()
            with pytest.raises(ReplicaLost):
                await hung

    play(work())
