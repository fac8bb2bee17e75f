"""Processes that form gloo worlds, for tests: a function on every rank of one (`on_ranks`), and
members that outlive each other, with a fresh store and group for each generation (`Crew`).

Processes are forked from a server that has imported torch (and torch._dynamo, which its optimizers
want) and most of `train`, so that one costs milliseconds. What a function raises fails the test
with its traceback.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from train.world import GlooWorld, WorldChanged, join

TIMEOUT_S = 120.0  # nobody waits that long: connections of the lost break at once
DEADLINE_S = 280.0
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "pydantic", "pytest", __name__]
PRELOAD += ["train.run", "train.parallel.pipeline_job"]


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` in `size` processes; its results by rank.

    function: a module-level one; what it returns must pickle.
    """
    with Crew(size) as crew:
        return crew.values(_once, function, arguments)


def _once(
    _kept: dict[str, Any], world: GlooWorld, function: Callable[..., Any], arguments: Any
) -> Any:
    return function(world, *arguments)


class Answer(NamedTuple):
    """What became of a call on one member: a value, or WorldChanged, or death."""

    kind: str  # "value", "changed", "dead"
    value: Any


def serve(conn: Any) -> None:
    """A worker: keeps `kept`, a dictionary of its own, over generations; answers calls."""
    torch.set_num_threads(1)
    kept: dict[str, Any] = {}
    world: GlooWorld | None = None
    while True:
        what, arguments = conn.recv()
        try:
            if what == "join":
                if world is not None:
                    world.close()
                rank, size, port, generation = arguments
                store = TCPStore("127.0.0.1", port, None, False)
                world = join(store, rank, size, generation=generation, timeout_s=TIMEOUT_S)
                conn.send(("value", os.getpid()))
            elif what == "end":
                return
            else:
                conn.send(("value", arguments[0](kept, world, *arguments[1:])))
        except WorldChanged as error:
            conn.send(("changed", str(error)))
        except Exception:
            conn.send(("error", traceback.format_exc()))


class Crew:
    """Members by number, in rank order. Use as a context: no process stays behind."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._conns: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._next = 0
        self.generation = -1
        self.hire(size)
        self.gather()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    @property
    def members(self) -> list[int]:
        return list(self._conns)

    @property
    def pids(self) -> dict[int, int]:
        return {member: self._processes[member].pid for member in self._conns}

    def hire(self, count: int) -> None:
        """New members, for the next `gather`."""
        for _ in range(count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._conns[self._next], self._processes[self._next] = ours, process
            self._next += 1

    def gather(self) -> None:
        """All living members meet in a new generation; ranks are their order."""
        self.generation += 1
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        size = len(self._conns)
        for rank, conn in enumerate(self._conns.values()):
            conn.send(("join", (rank, size, self._store.port, self.generation)))
        answers = self._answers()
        assert all(answer.kind == "value" for answer in answers.values()), answers

    def call(self, function: Callable[..., Any], *arguments: Any) -> dict[int, Answer]:
        """`function(kept, world, *arguments)` on all members; the dead are members no more."""
        for conn in self._conns.values():
            conn.send(("call", (function, *arguments)))
        return self._answers()

    def values(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same where nobody may fail; by rank."""
        answers = self.call(function, *arguments)
        assert all(answer.kind == "value" for answer in answers.values()), answers
        return [answer.value for answer in answers.values()]

    def kill(self, *members: int) -> None:
        """kill -9, now."""
        for member in members:
            os.kill(self._processes[member].pid, signal.SIGKILL)
            self._processes[member].join()
            self._conns.pop(member).close()

    def _answers(self) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        waiting: dict[int, Any] = dict(self._conns)
        while waiting:
            by_conn: dict[Any, int] = {conn: member for member, conn in waiting.items()}
            ready = connection.wait(list(by_conn), timeout=DEADLINE_S)
            assert ready, f"members {sorted(waiting)} do not answer"
            conn: Any
            for conn in ready:
                member = by_conn[conn]
                del waiting[member]
                try:
                    answers[member] = Answer(*conn.recv())
                except (EOFError, ConnectionResetError):
                    answers[member] = Answer("dead", None)
                    self._conns.pop(member)
                    self._processes[member].join()
                if answers[member].kind == "error":  # the others may wait for this one
                    raise AssertionError(f"member {member}:\n{answers[member].value}")
        return dict(sorted(answers.items()))


def die() -> None:
    """kill -9 of this process by itself."""
    os.kill(os.getpid(), signal.SIGKILL)
