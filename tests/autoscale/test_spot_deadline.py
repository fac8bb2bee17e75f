"""Jobs with deadlines: never late, exact where the market is known, and no dearer than the
baseline."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.simulate.jobs import run_job
from autoscale.spot.deadline import Job, LeastCost, Now, UniformProgress
from autoscale.spot.levels import Chain, fit
from tests.autoscale.spot_markets import recorded

JOB = Job(work_steps=20, deadline_steps=32, spot_usd=0.3, on_demand_usd=1.0)


def chain(up: float = 0.95, back: float = 0.2, steps: int = 4000, seed: int = 0) -> Chain:
    return fit(series(up, back, steps, seed)[:, None], ("a",), ("x",), (1,), 300.0)


def series(up: float, back: float, steps: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).random(steps)
    out, there = np.zeros(steps, dtype=np.int64), True
    for step in range(steps):
        there = bool(draws[step] < (up if there else back))
        out[step] = there
    return out


LEAST = LeastCost(JOB, chain(), "a")


@given(st.lists(st.booleans(), min_size=32, max_size=32))
def test_neither_is_ever_late(available: list[bool]):
    for policy in (LEAST, UniformProgress(JOB)):
        assert run_job(JOB, policy, np.array(available, dtype=np.int64)).on_time


def test_all_spot_and_none():
    always, never = np.ones(32, dtype=np.int64), np.zeros(32, dtype=np.int64)
    for policy in (LEAST, UniformProgress(JOB)):
        assert run_job(JOB, policy, always).usd == pytest.approx(21 * 0.3)  # one step to start
        assert run_job(JOB, policy, never).usd >= 21 * 1.0 - 1e-9
    assert run_job(JOB, LEAST, never).usd == pytest.approx(21.0)  # begun once, and no earlier


def test_the_programme_expects_what_it_pays():
    """Its expected cost, against the mean over many series of the chain it was made for."""
    policy = LeastCost(JOB, chain(steps=60_000), "a")
    seeds = range(2000)
    expected = 0.95 * policy.expected_usd(True) + 0.05 * policy.expected_usd(False)
    ours = [run_job(JOB, policy, series(0.95, 0.2, 32, seed)).usd for seed in seeds]
    theirs = [run_job(JOB, UniformProgress(JOB), series(0.95, 0.2, 32, seed)).usd for seed in seeds]
    assert np.mean(ours) == pytest.approx(expected, rel=0.05)
    assert np.mean(ours) < 0.97 * np.mean(theirs)


def test_uniform_progress_follows_its_line():
    policy = UniformProgress(JOB)
    assert policy.decide(Now(0, 20, "idle", False, 0)) == "idle"  # on the line
    assert policy.decide(Now(8, 17, "idle", False, 0)) == "on_demand"  # behind it: 5 were due
    assert policy.decide(Now(8, 17, "on_demand", True, 0)) == "on_demand"  # and stays until ahead
    assert policy.decide(Now(8, 12, "on_demand", True, 0)) == "spot"
    assert policy.decide(Now(8, 12, "on_demand", False, 0)) == "idle"
    assert policy.decide(Now(12, 18, "idle", True, 9)) == "on_demand"  # safety net


def test_an_impossible_job_is_refused():
    with pytest.raises(ValueError, match="need at least 21"):
        Job(20, 20, 0.3, 1.0)


@pytest.mark.data
def test_on_recorded_zones_ours_is_no_dearer():
    """Four hours of work in six, started every half day of the scored part, in three zones."""
    made = recorded("aws3")
    split = int(0.4 * made.steps)
    job = Job(74, 111, 0.3, 1.0)
    totals = {"ours": 0.0, "theirs": 0.0}
    for zone in (3, 4, 6):
        there = (made.capacity[:, zone] > 0).astype(np.int64)
        known = fit(there[:split, None], ("a",), ("x",), (1,), made.period_s)
        ours, theirs = LeastCost(job, known, "a"), UniformProgress(job)
        for start in range(split, made.steps - 111, 222):
            part = there[start : start + 111]
            runs = run_job(job, ours, part), run_job(job, theirs, part)
            assert all(run.on_time for run in runs)
            totals["ours"] += runs[0].usd
            totals["theirs"] += runs[1].usd
    assert totals["ours"] <= totals["theirs"]
