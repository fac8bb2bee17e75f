"""The engine's thread: calls between steps, its death, its rest, and that it does not spin."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from cluster.clock import WallClock
from serve.engine.engine import Engine
from serve.engine.loop import EngineLoop, EngineStopped
from serve.engine.sequence import Output
from tests.engine.fakes import Collected, engine, sequence, solo_tokens

LONG_S = 60.0  # for what happens at once unless something is broken


class Running:
    """An engine on its thread, with what came out of it."""

    def __init__(self, made: Engine) -> None:
        self.collected = Collected()
        self.deaths: list[str] = []
        self.ended = threading.Event()
        self.loop = EngineLoop(made, on_outputs=self.take, on_death=self.die, clock=WallClock())

    def take(self, outputs: Any) -> None:
        self.collected.take(outputs)
        if any(output.delta.finish is not None for output in outputs):
            self.ended.set()

    def die(self, why: str) -> None:
        self.deaths.append(why)

    def pause(self) -> threading.Event:
        """Stop the engine's thread in a call until the event returned is set."""
        blocked, go_on = threading.Event(), threading.Event()

        def wait(_: Engine) -> None:
            blocked.set()
            go_on.wait(LONG_S)

        self.loop.call(wait)
        assert blocked.wait(LONG_S)
        return go_on

    def __enter__(self) -> "Running":
        self.loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.001)


def test_a_call_starts_a_sequence_and_its_outputs_come_in_order():
    one = sequence("one", [1, 2, 3], 20, ignore_eos=True)
    with Running(engine()) as running:
        running.loop.call(lambda e: e.add(one)).result(LONG_S)
        assert running.ended.wait(LONG_S)
    assert running.collected.tokens["one"] == solo_tokens(one.request)
    assert running.deaths == ["it was stopped"]


def test_an_exception_in_a_call_is_its_callers_and_the_loop_goes_on():
    with Running(engine()) as running:
        with pytest.raises(ValueError, match="prompt is empty"):
            running.loop.call(lambda e: e.add(sequence("x", [], 2))).result(LONG_S)
        assert running.loop.call(lambda e: e.steps).result(LONG_S) == 0
        assert running.loop.failure is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_in_a_step_refuses_everybody_who_waits(monkeypatch):
    made = engine()
    entered, go_on = threading.Event(), threading.Event()

    def fail(_: object) -> Any:
        entered.set()
        go_on.wait(LONG_S)
        raise RuntimeError("the model broke")

    monkeypatch.setattr(made.runner, "run", fail)
    with Running(made) as running:
        running.loop.call(lambda e: e.add(sequence("one", [1], 2)))
        assert entered.wait(LONG_S)
        waiting: list[Future[int]] = [running.loop.call(lambda e: e.steps) for _ in range(5)]
        go_on.set()
        for call in [*waiting, running.loop.call(lambda e: e.steps)]:
            with pytest.raises(EngineStopped, match="the model broke"):
                call.result(LONG_S)
        wait_for(lambda: bool(running.deaths))
    assert running.deaths == ["RuntimeError: the model broke"] == [running.loop.failure]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callers_are_refused_even_when_nobody_can_be_told_of_the_death(monkeypatch):
    made = engine()
    with Running(made) as running:
        monkeypatch.setattr(running.loop, "on_death", lambda _: 1 // 0)
        go_on = running.pause()
        running.loop._calls.put(None)
        late = running.loop.call(lambda e: e.steps)
        go_on.set()
        with pytest.raises(EngineStopped):
            late.result(LONG_S)


def test_after_stop_calls_fail():
    with Running(engine()) as running:
        pass
    with pytest.raises(EngineStopped, match="it was stopped"):
        running.loop.call(lambda e: e.steps).result(LONG_S)


def test_a_cancelled_call_is_not_run():
    ran = list[int]()
    with Running(engine()) as running:
        go_on = running.pause()
        call = running.loop.call(lambda _: ran.append(1))
        assert call.cancel()
        go_on.set()
        running.loop.call(lambda _: None).result(LONG_S)
    assert ran == []


def test_a_stalled_engine_does_not_spin_and_recovers():
    """Sequences wait for pages that a reservation holds: a few looks, not thousands."""
    made = engine(pages=8, page_tokens=4)
    looks = 0
    schedule = made.scheduler.schedule

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return schedule()

    made.scheduler.schedule = counted  # type: ignore[method-assign]
    big = sequence("big", [1] * 20, 4, ignore_eos=True)
    with Running(made) as running:
        assert running.loop.call(lambda e: e.reserve(sequence("r", [3] * 16, 4))).result(LONG_S)
        running.loop.call(lambda e: e.add(big)).result(LONG_S)
        wait_for(lambda: looks > 3)
        before, start_s = looks, time.monotonic()
        time.sleep(0.3)
        rate = (looks - before) / (time.monotonic() - start_s)
        assert rate <= 1.2 / 0.005
        assert running.loop.call(lambda e: e.abort("r")).result(LONG_S)
        assert running.ended.wait(LONG_S)
    assert running.collected.tokens["big"] == solo_tokens(big.request)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_leak_is_found_when_the_engine_rests(monkeypatch):
    monkeypatch.setattr("serve.engine.loop.IDLE_S", 0.01)
    with Running(engine()) as running:
        running.loop.call(lambda e: e.scheduler.pool.allocate(1)).result(LONG_S)
        wait_for(lambda: running.loop.failure is not None)
    assert "AssertionError" in str(running.loop.failure)


class Stuck:
    """An engine that has work and never gets anywhere."""

    has_work, progressed, step_cost = True, False, 0.0

    def __init__(self, reserved: dict[str, object]) -> None:
        self.reserved = reserved
        self.held: dict[str, object] = {}
        self.steps = 0

    def step(self) -> list[Output]:
        self.steps += 1
        return []


@pytest.mark.parametrize("reserved", [False, True], ids=["stuck", "waits-for-a-hand-off"])
def test_steps_without_progress_are_no_sign_of_life(reserved):
    engine = Stuck({"r": object()} if reserved else {})
    clock = WallClock()
    loop = EngineLoop(engine, on_outputs=print, on_death=lambda why: None, clock=clock)  # type: ignore[arg-type]
    born_s = loop.last_alive_s
    loop.start()
    while engine.steps < 5:
        time.sleep(0.01)
    loop.stop()
    assert (loop.last_alive_s > born_s) == reserved
