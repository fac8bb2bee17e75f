"""Calls over a socket: many at once, streams, errors by name, and what ends with whom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.clients import Draining, ReplicaLost
from serve.machines.channel import Channel, Frame, listen
from tests.serving.tiny import run, until


class Scripted:
    """echo, count, hang (until cancelled), raise; keeps what became of the calls."""

    streams = frozenset({"count", "forever"})

    def __init__(self) -> None:
        self.under_way = 0

    async def answer(self, name: str, arguments: dict[str, Any], blob: bytes) -> Frame:
        if name == "echo":
            await asyncio.sleep(arguments.get("wait_s", 0))
            return Frame({"value": arguments}, blob)
        if name == "raise":
            raise {"Draining": Draining, "ReplicaLost": ReplicaLost, "KeyError": KeyError}[
                arguments["kind"]
            ]("so it is")
        self.under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.under_way -= 1
        raise AssertionError

    async def items(self, name: str, arguments: dict[str, Any]) -> AsyncIterator[bytes]:
        self.under_way += 1
        try:
            number = 0
            while name == "forever" or number < arguments["count"]:
                yield bytes([number % 256]) * 3
                number += 1
                await asyncio.sleep(0)
        finally:
            self.under_way -= 1


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[Channel, Scripted, asyncio.Server]]:
    scripted = Scripted()
    server = await listen(folder / "m.sock", scripted)
    channel = Channel(folder / "m.sock")
    try:
        yield channel, scripted, server
    finally:
        await channel.close()
        server.close()
        await asyncio.sleep(0.01)


def test_calls_and_streams_cross_as_they_are(tmp_path: Path):
    async def work() -> None:
        async with connected(tmp_path) as (channel, scripted, _):
            blob = bytes(range(256)) * 5000
            slow = asyncio.create_task(channel.call("echo", b"slow", wait_s=0.05))
            fast = await channel.call("echo", blob, word="\u00e9\n\0", many=[1, None])
            assert fast.head["value"] == {"word": "\u00e9\n\0", "many": [1, None]}
            assert fast.blob == blob and not slow.done(), "a slow call holds up no other"
            assert (await slow).blob == b"slow"
            items = [item async for item in channel.stream("count", count=300)]
            assert items == [bytes([n % 256]) * 3 for n in range(300)]
            assert scripted.under_way == 0 and channel._answers == {}

    run(work())


@pytest.mark.parametrize(
    "kind,raised",
    [("Draining", Draining), ("ReplicaLost", ReplicaLost), ("KeyError", RuntimeError)],
)
def test_errors_are_what_they_were(tmp_path: Path, kind: str, raised: type[Exception]):
    async def work() -> None:
        async with connected(tmp_path) as (channel, _, _):
            with pytest.raises(raised, match="so it is"):
                await channel.call("raise", kind=kind)

    run(work())


def test_who_leaves_ends_the_work(tmp_path: Path):
    """A cancelled call, a stream that is closed early, and a caller that is gone."""

    async def work() -> None:
        async with connected(tmp_path) as (channel, scripted, _):
            hanging = asyncio.create_task(channel.call("hang"))
            await until(lambda: scripted.under_way == 1)
            hanging.cancel()
            await until(lambda: scripted.under_way == 0)
            async with aclosing(channel.stream("forever")) as items:
                assert await anext(items) == b"\0\0\0"
            await until(lambda: scripted.under_way == 0)
            left = asyncio.create_task(channel.call("hang"))
            await until(lambda: scripted.under_way == 1)
            await channel.close()
            with pytest.raises(ReplicaLost, match="m is gone"):
                await left
            await until(lambda: scripted.under_way == 0)
            assert (await channel.call("echo", b"anew")).blob == b"anew"

    run(work())


def test_a_machine_that_never_was_cannot_be_reached(tmp_path: Path):
    async def work() -> None:
        with pytest.raises(ReplicaLost, match="nobody cannot be reached"):
            await Channel(tmp_path / "nobody.sock").call("echo")

    run(work())
