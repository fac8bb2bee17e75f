"""Shards of a parameter server over TCP, every byte counted: `Door` answers for one shard,
`Servers` is what a virtual worker sees of all of them.

A request is a head of fixed size, then facts and numbers as they lie in memory; a push is not
answered. All shards' answers are asked for before the first one is read.
"""

import socket
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.checkpoint.piece import as_bytes
from train.heterogeneous.hetpipe_server import FACTS, PATIENCE_S, Pulled, Shard, Stretch
from train.world import World, WorldChanged

LOOPBACK = "127.0.0.1"
HEAD = struct.Struct("!BIQQQ")
"""Of a request: what is asked for, worker, clock, first element, elements."""
ANSWER = struct.Struct("!QH")
"""Of an answer: version, and of how many workers facts follow."""
PUSH, PULL, PULL_EXACT = 1, 2, 3


class Door:
    """A shard's listening end. port: where; sent_bytes, received_bytes: over all connections."""

    def __init__(self, shard: Shard, host: str = LOOPBACK) -> None:
        self.shard, self.sent_bytes, self.received_bytes = shard, 0, 0
        self._lock = threading.Lock()
        self._socket = socket.create_server((host, 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Nobody new comes in; who is inside stays until its own end closes."""
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Until the other end is gone. What fails here ends the connection, which its user sees."""
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        dtype = self.shard.rule.masters.dtype
        with peer:
            try:
                while True:
                    kind, worker, clock, at, count = HEAD.unpack(_exactly(peer, HEAD.size))
                    received = HEAD.size
                    if kind == PUSH:
                        facts, gradient = (
                            torch.empty(FACTS).double(),
                            torch.empty(count, dtype=dtype),
                        )
                        received += _fill(peer, facts) + _fill(peer, gradient)
                        self._count(0, received)
                        self.shard.push(worker, clock, at, gradient, facts)
                        continue
                    exact = kind == PULL_EXACT
                    found = self.shard.pull(worker, clock, at, count, exact=exact)
                    self._count(_answer(peer, found), received)
            except (OSError, EOFError):
                return  # a peer that is gone, or too late: it sees the end of the connection

    def _count(self, sent: int, received: int) -> None:
        with self._lock:
            self.sent_bytes += sent
            self.received_bytes += received


class Servers:
    """One virtual worker's (or stage's) way to all shards, shard k for the k-th stretch.

    own: the shard of this process, which is asked without a connection. sent_bytes: requests with
    what they carry; received_bytes: answers.
    """

    def __init__(
        self, worker: int, stretches: Sequence[Stretch], ports: Sequence[int], own: dict[int, Shard]
    ) -> None:
        self.worker, self.stretches, self._own = worker, list(stretches), own
        self.sent_bytes = self.received_bytes = 0
        self._links: dict[int, socket.socket] = {}
        for number, port in enumerate(ports):
            if number not in own:
                link = socket.create_connection((LOOPBACK, port), timeout=PATIENCE_S + 60)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._links[number] = link

    def close(self) -> None:
        """Ends all connections."""
        for link in self._links.values():
            link.close()

    def push(self, clock: int, start: int, gradient: Tensor, facts: Tensor) -> None:
        """A wave's gradient, flat, from element `start` of the model on. WorldChanged when a server
        is gone."""
        for number, part in self._parts(start, start + gradient.numel()):
            values = gradient[part.mine]
            if number in self._own:
                self._own[number].push(self.worker, clock, part.at, values.clone(), facts)
                continue
            head = HEAD.pack(PUSH, self.worker, clock, part.at, values.numel())
            self._send(number, head, as_bytes(facts), as_bytes(values))

    def pull(self, clock: int, start: int, into: Tensor, *, exact: bool = False) -> list[Pulled]:
        """Weights from element `start` on into a flat tensor; what each shard said, by the shards'
        order. As `Shard.pull`; WorldChanged when a server, or another worker, is gone."""
        parts = list(self._parts(start, start + into.numel()))
        kind = PULL_EXACT if exact else PULL
        for number, part in parts:
            if number in self._links:
                count = part.mine.stop - part.mine.start
                self._send(number, HEAD.pack(kind, self.worker, clock, part.at, count))
        found = []
        for number, part in parts:
            target = into[part.mine]
            if number in self._own:
                try:
                    pulled = self._own[number].pull(
                        self.worker, clock, part.at, target.numel(), exact=exact
                    )
                except TimeoutError as error:
                    raise WorldChanged(reason=str(error)) from error
            else:
                pulled = self._receive(number, target)
            target.copy_(pulled.weights)
            found.append(pulled)
        return found

    def _parts(self, start: int, stop: int) -> list[tuple[int, "_Part"]]:
        """Where each shard's stretch and [start, stop) meet."""
        found = []
        for number, (first, last) in enumerate(self.stretches):
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append((number, _Part(low - first, slice(low - start, high - start))))
        return found

    def _send(self, number: int, *parts: bytes | memoryview) -> None:
        try:
            for part in parts:
                self._links[number].sendall(part)
                self.sent_bytes += len(part)
        except OSError as error:
            raise WorldChanged(reason=f"parameter server {number}: {error}") from error

    def _receive(self, number: int, like: Tensor) -> Pulled:
        link = self._links[number]
        try:
            version, known = ANSWER.unpack(_exactly(link, ANSWER.size))
            received, facts = ANSWER.size, None
            if known:
                facts = torch.empty(known, FACTS).double()
                received += _fill(link, facts)
            weights = torch.empty_like(like)
            received += _fill(link, weights)
        except (OSError, EOFError) as error:
            raise WorldChanged(reason=f"parameter server {number}: {error}") from error
        self.received_bytes += received
        return Pulled(version, facts, weights)


class _Part(NamedTuple):
    """at: first element in the shard; mine: the same elements of the asker's tensor."""

    at: int
    mine: slice


def open_doors(world: World, door: Door) -> list[int]:
    """Everybody's port, by rank. Collective."""
    told = world.all_gather(torch.tensor([door.port], dtype=torch.int64))
    return [int(row[0]) for row in told]


def stretches(elements: int, servers: int) -> list[Stretch]:
    """A model's elements shared among servers, as evenly as whole ones allow."""
    ends = [elements * n // servers for n in range(servers + 1)]
    return [Stretch(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def _answer(peer: socket.socket, found: Pulled) -> int:
    workers = 0 if found.facts is None else len(found.facts)
    parts: list[bytes | memoryview] = [ANSWER.pack(found.version, workers)]
    if found.facts is not None:
        parts.append(as_bytes(found.facts.flatten()))
    parts.append(as_bytes(found.weights))
    for part in parts:
        peer.sendall(part)
    return sum(map(len, parts))


def _exactly(link: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    _read(link, memoryview(buffer))
    return bytes(buffer)


def _fill(link: socket.socket, tensor: Tensor) -> int:
    """Reads a tensor's bytes; how many."""
    if tensor.numel():
        _read(link, as_bytes(tensor.view(-1)))
    return tensor.nbytes


def _read(link: socket.socket, place: memoryview) -> None:
    while place:
        count = link.recv_into(place)
        if not count:
            raise EOFError("the connection has ended")
        place = place[count:]
