"""Messages between stages that nobody waits for: sends leave by a thread for each receiver, what
comes in is fetched ahead by a thread for each sender. Tensors between two ranks keep their order.

Every failure on one channel closes the world's connections (`abandon`), so that no member goes on
waiting for a living one that has given up already.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from torch import Tensor

from train.world import World, WorldChanged

AHEAD = 2  # tensors fetched before they are asked for
UNUSED_TAG = 999_983  # nobody sends with it


def abandon(world: World) -> None:
    """Closes this rank's connections: whatever is waiting on them, here or on a peer, fails now.

    Gloo has no call for it that wakes a blocked receiver; a receive that runs out of time closes
    all connections. One on a closed connection fails before that, so each is tried.
    """
    if world.group is None:
        return
    for peer in range(world.size):
        if peer != world.rank:
            try:
                work = world.group.recv([torch.zeros(1)], peer, UNUSED_TAG)
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue  # what it is for


class Inbox:
    """Tensors of known shapes from one rank, fetched ahead, in order."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> None:
        self._ready: queue.Queue[Tensor | Exception] = queue.Queue(AHEAD)
        self._shapes, self._dtype = shapes, dtype
        self.closed = False

    def fetch(self, world: World, source: int, fail: Callable[[Exception], None]) -> None:
        """The thread's work."""
        try:
            for shape in self._shapes:
                tensor = torch.empty(shape, dtype=self._dtype)
                world.recv(tensor, source)
                self._put(tensor)
        except Exception as error:  # handed to whoever waits
            fail(error)
            self._put(error)

    def _put(self, item: Tensor | Exception) -> None:
        while not self.closed:
            try:
                self._ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue

    def get(self, meanwhile: Callable[[], bool] = lambda: False) -> Tensor:
        """The next tensor. meanwhile: called while it is not there yet, for as long as it finds
        something to do (returns True)."""
        while True:
            try:
                item = self._ready.get_nowait()
            except queue.Empty:
                if meanwhile():
                    continue
                item = self._ready.get()
            if isinstance(item, Exception):
                raise item
            return item


class Channels:
    """One rank's channels in one world, for one step. `close` it in any case."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._out: dict[int, queue.Queue[Tensor | None]] = {}
        self._inboxes: list[Inbox] = []
        self._threads: list[threading.Thread] = []
        self._error: Exception | None = None
        self.sent_bytes = 0

    def send(self, tensor: Tensor, to: int) -> None:
        """Puts a tensor on its way; it must not change until `flush`."""
        if to not in self._out:
            self._out[to] = queue.Queue()
            self._start(self._deliver, to)
        self.sent_bytes += tensor.numel() * tensor.element_size()
        self._out[to].put(tensor)

    def expect(self, source: int, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> Inbox:
        """Starts to fetch what `source` will send."""
        inbox = Inbox(shapes, dtype)
        self._inboxes.append(inbox)
        self._start(inbox.fetch, self._world, source, self._fail)
        return inbox

    def flush(self) -> None:
        """Returns when all that was sent has been received; raises if any of it cannot be."""
        for waiting in self._out.values():
            waiting.join()
        if self._error:
            raise self._error

    def close(self, *, broken: bool) -> None:
        """Ends the threads. broken: the step is given up, connections and all."""
        if broken:
            abandon(self._world)
        for waiting in self._out.values():
            waiting.put(None)
        for inbox in self._inboxes:
            inbox.closed = True
        for thread in self._threads:
            thread.join()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _deliver(self, to: int) -> None:
        while (tensor := self._out[to].get()) is not None:
            if self._error is None:
                try:
                    self._world.send(tensor, to)
                except Exception as error:  # raised again by `flush`
                    self._fail(error)
            self._out[to].task_done()

    def _fail(self, error: Exception) -> None:
        first, self._error = self._error is None, error
        if first and isinstance(error, WorldChanged):
            abandon(self._world)
