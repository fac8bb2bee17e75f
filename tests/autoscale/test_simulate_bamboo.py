"""Bamboo's rows: what its published simulator prints for BERT, mean of the seeds 1 to 20."""

import statistics
from typing import NamedTuple

import pytest

from autoscale.simulate.bamboo import BERT, Draws, Machine, Training, read_trace
from tests.autoscale.spot_markets import DATA


class Row(NamedTuple):
    """preemptions, fatal ones, machines, samples/s, $/h, value."""

    preemptions: float
    fatal: float
    machines: float
    samples_per_s: float
    usd_per_h: float
    value: float


PUBLISHED = {
    0.01: Row(4.85, 0, 43.9, 147.1, 39.95, 3.67),
    0.05: Row(26.8, 0.15, 42.4, 133.4, 38.6, 3.46),
    0.10: Row(57.2, 0.05, 40.4, 130.7, 36.8, 3.55),
    0.25: Row(145, 0.65, 34.7, 113.8, 31.6, 3.59),
    0.50: Row(352, 2.85, 26.4, 81.1, 24.0, 3.32),
}
ON_DEMAND_VALUE = 264 / 2.51 / (20 * 3.06)


def mean_row(removal: float) -> Row:
    runs = [Training(BERT, Draws(removal, seed, BERT.capacity)).run() for seed in range(1, 21)]
    assert all(run.steps == BERT.steps for run in runs)
    return Row(*(statistics.mean(getattr(run, name) for run in runs) for name in Row._fields))


@pytest.mark.parametrize(
    "removal",
    [0.10, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.01, 0.05, 0.25, 0.50))],
)
def test_a_published_row(removal: float):
    found = mean_row(removal)
    for name, ours, theirs in zip(Row._fields, found, PUBLISHED[removal], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03), name
    assert found.value > 1.9 * ON_DEMAND_VALUE


def test_without_redundancy_every_loss_is_fatal(monkeypatch: pytest.MonkeyPatch):
    def never(self: Training, lost: Machine) -> bool:
        return False

    with_it = Training(BERT, Draws(0.25, 1, BERT.capacity)).run()
    monkeypatch.setattr(Training, "_stand_in", never)
    without = Training(BERT, Draws(0.25, 1, BERT.capacity)).run()
    assert without.fatal > 20 * max(1, with_it.fatal)


@pytest.mark.data
def test_the_recorded_trace_is_replayed():
    """Against what the published simulator makes of the same trace."""
    path = DATA / "bamboo" / "traces" / "p3-trace.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    events = read_trace(path.read_text(encoding="utf-8").splitlines())
    run = Training(BERT, trace=events).run(max(event.at_ms for event in events))
    assert (run.preemptions, run.fatal, run.steps) == (167, 6, 11375)
    assert run.samples_per_s == pytest.approx(73.7345, rel=1e-4)
    assert run.usd_per_h == pytest.approx(21.902, rel=1e-3)
    assert run.value == pytest.approx(3.3440, rel=1e-4)


def test_a_made_trace_is_read_and_a_bad_row_named():
    lines = [f"0,add,n{place}" for place in range(12)] + ["3600000,remove,n3"]
    run = Training(BERT, trace=read_trace(lines)).run(3_700_000)
    assert run.preemptions == 1
    first = (3_600_000 - 45_000 - 30_000) // BERT.step_ms[1]
    assert first <= run.steps <= first + 1 + 100_000 / BERT.step_ms[1]
    with pytest.raises(ValueError, match="row 1"):
        read_trace(["a,add,n"])
