"""A generation's process group: made from a plan, ended from another thread, closed for the next.

Gloo cannot be told to give up an operation that waits for a peer, nor a peer that stopped be told
apart from a slow one. But its operations end when their connections do. So a fence shuts down the
connections that the process opened while the group was made, and the waiting collective raises at
once. (Its listening socket is left alone: gloo would abort the process.)
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from train.world import GlooWorld, WorldChanged, join

POLL_S = 0.01


class Gate:
    """Whether one generation is over; shared by the thread that trains and the one that listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: dict[int, str] | None = None
        self.fenced = False

    def opening(self) -> None:
        """What the process opens from now on belongs to the group."""
        with self._lock:
            self._before = _sockets()

    def closed(self) -> None:
        """The group is gone; its descriptors may be other files by now."""
        with self._lock:
            self._before = None

    def fence(self) -> None:
        """Ends the generation: whatever waits in its group raises. Any thread, any number of
        times."""
        with self._lock:
            self.fenced = True
            if self._before is not None:
                before = self._before
                for handle, name in _sockets().items():
                    if before.get(handle) != name:
                        _shut(handle)

    def check(self) -> None:
        """WorldChanged if the generation is over."""
        if self.fenced:
            raise WorldChanged(reason="the generation was ended")


@contextmanager
def meet(
    gate: Gate,
    *,
    address: tuple[str, int],
    name: str,
    rank: int,
    size: int,
    generation: int,
    timeout_s: float,
) -> Iterator[GlooWorld]:
    """The world of `size` workers that come to the store at `address` under `name`.

    All must be there before gloo connects, so that a peer that died on the way costs no timeout:
    until then a fence ends the wait. WorldChanged if the group cannot be made.
    """
    gate.check()
    gate.opening()
    world: GlooWorld | None = None
    try:
        try:
            store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout_s))
            there = f"{name}/there/{generation}"
            _all_there(store, there, size, gate, timeout_s)
            prefix = PrefixStore(name, store)
            world = join(prefix, rank, size, generation=generation, timeout_s=timeout_s)
        except (RuntimeError, dist.DistError) as error:
            raise WorldChanged(reason=str(error).partition("\n")[0]) from error
        gate.check()
        yield world
    finally:
        gate.closed()
        if dist.is_initialized():
            dist.destroy_process_group()


def _all_there(store: TCPStore, key: str, size: int, gate: Gate, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    store.add(key, 1)
    while store.add(key, 0) < size:
        gate.check()
        if time.monotonic() > deadline:
            raise WorldChanged(reason=f"not all {size} workers came within {timeout_s:g} s")
        time.sleep(POLL_S)


def _sockets() -> dict[int, str]:
    """This process's sockets: descriptor to the kernel's name of it."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # it was the listing's own
        if target.startswith("socket:"):
            found[int(entry)] = target
    return found


def _shut(handle: int) -> None:
    """Shuts a connection down; leaves anything else, such as a listening socket, alone."""
    try:
        connection = socket.socket(fileno=os.dup(handle))
    except OSError:
        return
    try:
        connection.getpeername()
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
    finally:
        connection.close()
