"""The thread that steps an engine, and the only one that touches it.

Others reach the engine by `call`, which runs a function between two steps. Outputs go to
`on_outputs` once a step. An exception in a step is not survivable for the sequences in it: the loop
records it as `failure`, calls `on_death`, refuses what is queued, and ends; the replica's health
turns red. Both callbacks run on the engine's thread. Used by both kinds of replica.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cluster.clock import Clock
from serve.engine.engine import Engine
from serve.engine.pace import Pace
from serve.engine.sequence import Output

IDLE_S = 1.0  # between looks at an engine without work
STALLED_S = 0.005  # between tries when sequences wait for pages that somebody else must free

T = TypeVar("T")


class EngineStopped(RuntimeError):
    """The loop has ended, by `stop` or by an exception in a step; the message says which."""


class _Call:
    """A function to run between steps, and who waits for its result."""

    def __init__(self, function: Callable[[Engine], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self, engine: Engine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(engine))
        except Exception as error:  # it belongs to the caller, not to the loop
            self.future.set_exception(error)

    def refuse(self, why: str) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(EngineStopped(why))


class EngineLoop:
    """Owns the engine's thread. `start` once, `stop` once; `call` from any thread in between."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_death: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.engine = engine
        self.on_outputs = on_outputs
        self.on_death = on_death
        self.clock = clock
        self.failure: str | None = None
        self.last_alive_s = clock.now_s()
        self.pace = Pace()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()
        self._unchecked = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way; calls from then on fail with EngineStopped."""
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Run `function(engine)` between two steps; its result or exception is the future's."""
        call = _Call(function)
        with self._lock:  # so that no call slips in behind the last look of a dying loop
            if self.failure is None:
                self._calls.put(call)
                return call.future
        call.refuse(f"the engine has stopped: {self.failure}")
        return call.future

    def _run(self) -> None:
        why = "it was stopped"
        try:
            while self._take_calls():
                self._step()
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._die(why)

    def _step(self) -> None:
        began_s = self.clock.now_s()
        outputs = self.engine.step()
        if self.engine.progressed:
            self.pace.note(self.engine.step_cost, self.clock.now_s() - began_s)
        # Without progress only pages that a hand-off will free are worth waiting for.
        if self.engine.progressed or self.engine.reserved or self.engine.held:
            self.last_alive_s = self.clock.now_s()
        if outputs:
            self._unchecked = True
            self.on_outputs(outputs)

    def _take_calls(self) -> bool:
        """Run what is queued, waiting for more while no step can be made; False when stopped."""
        while True:
            try:
                call = self._calls.get(timeout=self._patience_s())
            except queue.Empty:
                if self.engine.has_work:
                    return True
                self._rest()
                continue
            if call is None:
                return False
            call.run(self.engine)
            self._unchecked = True

    def _patience_s(self) -> float:
        """How long to wait for a call before stepping on."""
        if not self.engine.has_work:
            return IDLE_S
        return 0.0 if self.engine.progressed else STALLED_S

    def _rest(self) -> None:
        """Nothing for a while: prove that nothing was leaked, once per quiet spell."""
        self.last_alive_s = self.clock.now_s()
        if self._unchecked:
            self.engine.check()
            self._unchecked = False

    def _die(self, why: str) -> None:
        with self._lock:
            self.failure = why
        while not self._calls.empty():
            call = self._calls.get_nowait()
            if call is not None:
                call.refuse(f"the engine has stopped: {why}")
        self.on_death(why)
