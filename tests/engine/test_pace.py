"""What a step is believed to take, against the line that made the steps."""

import random

import pytest

from serve.engine.pace import Pace


def noted(steps):
    pace = Pace()
    for cost, seconds in steps:
        pace.note(cost, seconds)
    return pace


def test_nothing_noted_is_no_time():
    assert Pace().step_s(100) == 0.0


def test_a_line_is_found():
    pace = noted([(cost, 0.01 + 0.002 * cost) for cost in (4, 5, 200, 4, 256, 4)])
    assert pace.step_s(256) == pytest.approx(0.522)
    assert pace.step_s(8) == pytest.approx(0.026)


def test_noise_is_averaged_out_and_the_past_forgotten():
    rng = random.Random(1)
    steps = [(rng.choice([8, 256]), 1.0) for _ in range(100)]
    steps += [
        (c, (0.01 + 0.001 * c) * rng.uniform(0.8, 1.2)) for c in rng.choices([8, 64, 256], k=400)
    ]
    pace = noted(steps)
    assert pace.step_s(256) == pytest.approx(0.266, rel=0.1)
    assert pace.step_s(8) == pytest.approx(0.018, rel=0.5)


@pytest.mark.parametrize(
    "steps",
    [[(8.0, 0.02)] * 30, [(8.0, 0.02), (8.5, 0.02)] * 20, [(8.0, 0.5), (200.0, 0.1)] * 20],
    ids=["all alike", "almost alike", "larger took less"],
)
def test_where_the_parts_cannot_be_told_apart_work_is_dear(steps):
    pace = noted(steps)
    mean_s = sum(seconds for _, seconds in steps) / sum(cost for cost, _ in steps)
    assert pace.step_s(1000) == pytest.approx(1000 * mean_s, rel=0.1)
    assert pace.step_s(0) == 0
