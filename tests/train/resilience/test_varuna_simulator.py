"""The step simulator against closed forms and a simulation of another kind; the choice against
every (P, D)."""

import heapq
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.parallel.pipeline_layout import Span, grid
from train.resilience.varuna_simulator import Measured, StageTimes, choose, play, step_seconds

WHOLE = st.integers(0, 30).map(float)
STAGES = st.lists(st.builds(StageTimes, WHOLE, WHOLE, WHOLE), min_size=1, max_size=5)


def by_events(stages: list[StageTimes], micros: int) -> list[float]:
    """Completions and arrivals from one queue in the order of time, as if watching the machines."""
    count = len(stages)
    order = [schedule(s, count, micros) for s in range(count)]
    here = {(0, "F", m) for m in range(micros)} | {(count - 1, "B", m) for m in range(micros)}
    line: dict[tuple[int, int], float] = {}
    busy, ends = [False] * count, [0.0] * count
    events: list[tuple[float, int, str, int, bool]] = []
    now = 0.0

    def send(s: int, to: int, kind: str, m: int, taking: float) -> None:
        line[s, to] = max(now, line.get((s, to), 0.0)) + taking
        heapq.heappush(events, (line[s, to], to, kind, m, True))

    while True:
        for s in range(count):
            if order[s] and not busy[s] and (s, *order[s][0]) in here:
                kind, m = order[s].pop(0)
                busy[s] = True
                taking = stages[s].forward_s if kind == "F" else stages[s].backward_s
                heapq.heappush(events, (now + taking, s, kind, m, False))
        if not events:
            return ends
        now, s, kind, m, arrived = heapq.heappop(events)
        if arrived:
            here.add((s, kind, m))
            continue
        busy[s], ends[s] = False, now
        if kind == "F" and s + 1 < count:
            send(s, s + 1, "F", m, stages[s].send_s)
        if kind == "B" and s:
            send(s, s - 1, "B", m, stages[s - 1].send_s)


def schedule(stage: int, stages: int, micros: int) -> list[tuple[str, int]]:
    """1F1B as a list: forwards to fill the pipeline, then pairs, then the last backwards."""
    ahead = min(micros, stages - stage - 1)
    acts = [("F", m) for m in range(ahead)]
    for m in range(micros - ahead):
        acts += [("F", ahead + m), ("B", m)]
    return acts + [("B", m) for m in range(micros - ahead, micros)]


@given(STAGES, st.integers(1, 9))
def test_equals_an_event_queue(stages: list[StageTimes], micros: int):
    assert play(stages, micros) == by_events(stages, micros)


@given(st.integers(1, 8), st.integers(1, 20))
def test_bubble_is_the_published_one(stages: int, micros: int):
    """Equal stages and no messages: (m + p - 1)(f + b), so a bubble of (p - 1) / (m + p - 1)."""
    if micros < stages:
        micros = stages
    assert max(play([StageTimes(2, 4, 0)] * stages, micros)) == (micros + stages - 1) * 6


def measured(memory: float = 1e9) -> Measured:
    return Measured(
        (1.0, 2.0, 2.0, 3.0, 1.0), (2.0, 4.0, 4.0, 6.0, 2.0), (0.1,) * 5, (4.0,) * 5, (12.0,) * 5,
        (2.0,) * 5, 0.05, 10.0, memory,
    )  # fmt: skip


@pytest.mark.parametrize("memory", [1e9, 36.0, 24.0, 12.0])
@pytest.mark.parametrize("workers", range(1, 9))
def test_choice_is_the_best_of_all(workers: int, memory: float):
    """Over every number of stages and chains and every cut."""
    costs = measured(memory)
    best = float("inf")
    for stages in range(1, min(workers, 5) + 1):
        for inner in combinations(range(1, 5), stages - 1):
            ends = [0, *inner, 5]
            spans = [Span(a, b) for a, b in zip(ends, ends[1:], strict=False)]
            if max(12.0 * (b - a) for a, b in spans) <= memory:
                for chains in range(1, workers // stages + 1):
                    layout = grid(spans, chains, 16, 2)
                    best = min(best, step_seconds(costs, layout))
    if best == float("inf"):
        with pytest.raises(ValueError, match="memory_bytes"):
            choose(costs, workers, 16, 2)
        return
    choice = choose(costs, workers, 16, 2)
    assert choice.layout.samples == 16
    assert choice.step_s == step_seconds(costs, choice.layout)
    # The cut is by the estimate of the first micro-batch's way and the slowest stage.
    assert best <= choice.step_s <= 1.06 * best


def test_the_choice_weighs_gradients_against_bubbles():
    """Nothing to exchange: chains. Large gradients over a slow link: stages."""
    free = replace(measured(), gradient_bytes=(0.0,) * 5, latency_s=0.0)
    assert len(choose(free, 4, 16, 2).layout.chains) == 4
    dear = replace(measured(), gradient_bytes=(400.0,) * 5)
    assert len(choose(dear, 4, 16, 2).layout.chains) == 1
