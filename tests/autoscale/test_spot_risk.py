"""The risk model: what it learns from a known chain, and its beliefs against path enumeration."""

import itertools

import numpy as np
import pytest

from autoscale.spot.belief import SpotRisk
from autoscale.spot.events import SpotEvent
from autoscale.spot.levels import PHASE_STARTS, Chain, fit, levels_for

POOLS = ("a", "b")


def history(seed: int, steps: int = 8000) -> np.ndarray:
    """Two pools of 4 or none: they leave with 0.02 and come back with 0.1 in each step."""
    draws = np.random.default_rng(seed).random((steps, 2))
    out = np.zeros((steps, 2), dtype=np.int64)
    up = [True, True]
    for step in range(steps):
        up = [bool(draws[step, pool] < (0.98 if up[pool] else 0.1)) for pool in range(2)]
        out[step] = [4 * there for there in up]
    return out


def chain(capacity: np.ndarray, levels: tuple[int, ...] = (1, 2, 3, 4)) -> Chain:
    return fit(capacity, POOLS, ("x", "x"), levels, 300.0)


@pytest.mark.parametrize("seed", range(3))
def test_rates_of_a_known_chain_are_found(seed: int):
    found = chain(history(seed))
    assert found.drop[:4] == pytest.approx(0.02, rel=0.6)
    assert found.rise[:3] == pytest.approx(0.1, rel=0.35)
    assert found.drop_to[0] > 0.99
    assert found.rise_to[4] > 0.99
    assert found.together < 0.06  # the pools know nothing of each other


def test_hazards_fall_with_age():
    """Half of the spells end after 3 steps, the others last 200: a long one is safe."""
    spells = ([4] * 3 + [0] * 2) * 50 + ([4] * 200 + [0] * 2) * 5
    found = fit(np.array([spells]).T, ("a",), ("x",), (1, 2, 3, 4), 300.0)
    assert all(now >= later for now, later in itertools.pairwise(found.drop))
    assert found.drop[1] > 10 * found.drop[5]


def test_a_pool_that_drops_more_gets_a_factor_of_its_own():
    calm = np.full(2000, 4)
    wild = np.tile([4] * 20 + [0], 96)[:2000]
    found = chain(np.stack([calm, wild], axis=1))
    risk = SpotRisk(found)
    assert risk.factors[0] < 0.7 < 1.05 < risk.factors[1]


def test_pools_of_a_region_that_go_together_are_seen():
    series = np.array(([4] * 20 + [0] * 3) * 40)
    found = chain(np.stack([series, series], axis=1))
    assert found.together == 1.0


@pytest.mark.parametrize("factor", [0.2, 1.0, 30.0])
def test_chances_sum_to_one(factor: float):
    matrix = chain(history(0)).matrix(factor)
    assert matrix.sum(1) == pytest.approx(1.0)
    assert (matrix >= 0).all()


def test_beliefs_are_those_of_all_paths():
    """Three observations of a chain with two levels, against the sum over every path."""
    found = chain(history(1, 800), (4,))
    risk = SpotRisk(found)
    matrix = found.matrix(float(risk.factors[0]))
    levels = found.state_levels
    start = risk.beliefs[0].copy()
    seen = [
        ("launch_fail", 0, levels == 0),
        ("held", 0, levels >= 0),
        ("launch_ok", 4, levels == 1),
    ]
    for step, (kind, value, _) in enumerate(seen, 1):
        risk.observe(SpotEvent(300.0 * step, "a", kind, value))  # type: ignore[arg-type]
    expected = np.zeros(len(levels))
    for path in itertools.product(range(len(levels)), repeat=3):
        weight = float(start @ matrix[:, path[0]]) * seen[0][2][path[0]]
        for step in (1, 2):
            weight *= matrix[path[step - 1], path[step]] * seen[step][2][path[step]]
        expected[path[2]] += weight
    assert risk.beliefs[0] == pytest.approx(expected / expected.sum(), abs=1e-9)


def test_a_refusal_is_remembered_and_forgotten():
    risk = SpotRisk(chain(history(2)))
    usual = risk.chance("a", 1)
    risk.observe(SpotEvent(300.0, "a", "launch_fail", 0))
    after = [risk.chance("a", 1)]
    for step in range(2, 400):
        risk.observe(SpotEvent(300.0 * step, "a", "held", 0))
        after.append(risk.chance("a", 1))
    assert after[0] < 1e-6
    assert all(now < later for now, later in itertools.pairwise(after[:20]))
    assert after[-1] == pytest.approx(usual, abs=0.05)


@pytest.mark.parametrize("steps", [1, 4])
def test_survivors_are_those_of_walks(steps: int):
    """Against 20,000 random walks: the least level on the way is what is kept."""
    stairs = np.random.default_rng(3).integers(0, 5, 4000)
    found = fit(stairs[:, None], ("a",), ("x",), (1, 2, 3, 4), 300.0)
    risk = SpotRisk(found)
    kept = risk.survivors(300.0 * steps)[0]
    draws = np.random.default_rng(4)
    matrix, levels = found.matrix(float(risk.factors[0])), found.state_levels
    able = risk.beliefs[0] * (levels >= 3)
    walks = 20_000
    state = draws.choice(len(levels), walks, p=able / able.sum())
    least = np.full(walks, 3)
    edges = np.cumsum(matrix, axis=1)
    for _ in range(steps):
        state = (edges[state] < draws.random(walks)[:, None]).sum(1).clip(max=len(levels) - 1)
        least = np.minimum(least, levels[state])
    counted = np.bincount(least, minlength=4) / walks
    assert kept[3, :4] == pytest.approx(counted, abs=0.015)
    assert kept.sum(1) == pytest.approx(1.0)


def test_phases_and_levels():
    assert PHASE_STARTS[0] == 0
    assert levels_for(4, 64) == (1, 2, 3, 4)
    assert levels_for(100, 60) == (15, 30, 45, 60)
    assert levels_for(2, 9) == (1, 2)


def test_a_history_of_one_step_is_refused():
    with pytest.raises(ValueError, match="at least 2 steps"):
        chain(history(0)[:1])
