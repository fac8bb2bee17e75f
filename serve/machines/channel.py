"""Calls between processes of one machine, over a unix socket: JSON, and bytes beside it.

A frame is two lengths, a JSON head and a blob. Many calls are under way at once on a connection; a
call has one answer or a stream of items. Nothing is unpickled. When a connection ends, calls under
way raise ReplicaLost at the caller and are cancelled at the other end.
"""

import asyncio
import contextlib
import itertools
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from serve.clients import Draining, ReplicaLost

LENGTHS = struct.Struct("<II")
RAISED = {error.__name__: error for error in (Draining, ReplicaLost, ValueError)}


class Frame(NamedTuple):
    """head: JSON values. blob: bytes that come along."""

    head: dict[str, Any]
    blob: bytes = b""


class Served(Protocol):
    """What answers: `streams` names the calls that are answered by items."""

    streams: frozenset[str]

    async def answer(self, name: str, arguments: dict[str, Any], blob: bytes) -> Frame:
        """The answer's value (head["value"]) and blob; raises what the caller is to get."""
        ...

    def items(self, name: str, arguments: dict[str, Any]) -> AsyncIterator[bytes]:
        """The items of a stream, each a blob."""
        ...


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    """asyncio.IncompleteReadError or ConnectionError when the other end is gone."""
    head, blob = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
    return Frame(json.loads(await reader.readexactly(head)), await reader.readexactly(blob))


def frame_bytes(frame: Frame) -> bytes:
    """As it is sent."""
    head = json.dumps(frame.head, separators=(",", ":")).encode()
    return LENGTHS.pack(len(head), len(frame.blob)) + head + frame.blob


class Channel:
    """The caller's end. It connects when first used, and anew after a loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Frame | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def call(self, name: str, blob: bytes = b"", **arguments: Any) -> Frame:
        """The answer. ReplicaLost when the other end is gone; Draining and ValueError as they were
        raised there, RuntimeError for any other. Cancelling the call cancels it there too."""
        async with contextlib.aclosing(self._frames(name, blob, arguments)) as frames:
            return await anext(frames)

    async def stream(self, name: str, **arguments: Any) -> AsyncGenerator[bytes, None]:
        """The items, until the other end has no more; errors as of `call`."""
        async with contextlib.aclosing(self._frames(name, b"", arguments)) as frames:
            async for frame in frames:
                yield frame.blob

    async def close(self) -> None:
        """Leave; calls under way raise ReplicaLost. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _frames(
        self, name: str, blob: bytes, arguments: dict[str, Any]
    ) -> AsyncGenerator[Frame, None]:
        await self._connect()
        number, under_way = next(self._numbers), True
        answers = self._answers[number] = asyncio.Queue()
        try:
            self._send(Frame({"id": number, "call": name, "arguments": arguments}, blob))
            while under_way:
                frame = await answers.get()
                under_way = frame is not None and "item" in frame.head
                if frame is None:
                    raise ReplicaLost(f"{self.path.stem} is gone")
                if "error" in frame.head:
                    raise RAISED.get(frame.head["error"], RuntimeError)(frame.head["text"])
                if "end" not in frame.head:
                    yield frame
        finally:
            self._answers.pop(number, None)
            if under_way and self._writer is not None:
                self._send(Frame({"id": number, "call": ""}))  # what is left of it may end

    async def _connect(self) -> None:
        async with self._connecting:
            if self._writer is not None:
                return
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self.path))
            except OSError as error:
                raise ReplicaLost(f"{self.path.stem} cannot be reached: {error}") from error
            self._reading = asyncio.create_task(self._read(reader))

    def _send(self, frame: Frame) -> None:
        assert self._writer is not None
        self._writer.write(frame_bytes(frame))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                frame = await read_frame(reader)
                if (answers := self._answers.get(frame.head["id"])) is not None:
                    answers.put_nowait(frame)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()
            waiting, self._answers = self._answers, {}
            for answers in waiting.values():
                answers.put_nowait(None)


async def listen(path: Path, served: Served) -> asyncio.Server:
    """Answer calls at a socket, whose folder must keep strangers out."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                frame = await read_frame(reader)
                number = frame.head["id"]
                if not frame.head["call"]:
                    if number in tasks:
                        tasks[number].cancel()
                    continue
                task = tasks[number] = asyncio.create_task(_answer(served, frame, writer.write))
                task.add_done_callback(partial(_forget, tasks, number))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for task in list(tasks.values()):
                task.cancel()
            writer.close()

    return await asyncio.start_unix_server(connected, str(path))


def _forget(tasks: dict[int, asyncio.Task[None]], number: int, _: object) -> None:
    tasks.pop(number, None)


async def _answer(served: Served, frame: Frame, write: Callable[[bytes], None]) -> None:
    number, name = frame.head["id"], frame.head["call"]

    def say(blob: bytes = b"", **head: Any) -> None:
        write(frame_bytes(Frame({"id": number, **head}, blob)))

    try:
        if name in served.streams:
            async for item in served.items(name, frame.head["arguments"]):
                say(item, item=True)
            say(end=True)
        else:
            answer = await served.answer(name, frame.head["arguments"], frame.blob)
            say(answer.blob, **answer.head)
    except Exception as error:
        kind = next((n for n, known in RAISED.items() if isinstance(error, known)), "")
        say(error=kind, text=str(error) or type(error).__name__)
