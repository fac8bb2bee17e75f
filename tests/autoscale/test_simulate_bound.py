"""The all-knowing bound, against every schedule of small markets."""

import itertools

import numpy as np
import pytest

from autoscale.simulate.bound import bound, bound_without_starts
from autoscale.simulate.market import made_market
from autoscale.simulate.study import Study
from autoscale.spot.mixed import MixedPolicy
from tests.autoscale.spot_markets import market, recorded


def cheapest_schedule(capacity: list[list[int]], need: int, spot: float) -> float:
    """Every holding in every step, by a shortest path over holdings: exhaustive for tiny
    markets."""
    columns = len(capacity[0]) + 1
    price = [spot] * (columns - 1) + [1.0]

    def holdings(step: int) -> list[tuple[int, ...]]:
        most = [*capacity[step], need]
        return list(itertools.product(*(range(min(m, 2 * need) + 1) for m in most)))

    def paid(held: tuple[int, ...]) -> float:
        return sum(count * usd for count, usd in zip(held, price, strict=True))

    cost = {held: paid(held) for held in holdings(0)}
    for step in range(1, len(capacity)):
        after: dict[tuple[int, ...], float] = {}
        for held in holdings(step):
            before = [
                total
                for earlier, total in cost.items()
                if sum(map(min, earlier, held)) >= need  # answering: held now and the step before
            ]
            if before:
                after[held] = min(before) + paid(held)
        cost = after
    return min(cost.values()) / (need * len(capacity))


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_pools_with_some(seed: int):
    capacity = np.random.default_rng(seed).integers(0, 3, (7, 2)).tolist()
    found = bound(market(capacity), 2)
    exact = cheapest_schedule(capacity, 2, 0.3)
    assert found <= exact + 1e-9
    assert found == pytest.approx(exact, rel=0.02)  # whole machines cost little more than parts


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_pools_with_all_or_nothing(seed: int):
    capacity = (np.random.default_rng(seed).random((8, 2)) < 0.6).astype(int).tolist()
    assert bound(market(capacity), 1) == pytest.approx(cheapest_schedule(capacity, 1, 0.3))


def test_no_policy_undercuts_it():
    made = made_market(500, ("e1a", "w1a", "w1b"), depth=4, seed=2)
    study = Study(made, 4, 200)
    least = bound(made.part(200, 500), 4)
    for report in (study.hedge(0), study.mixed(MixedPolicy(400.0))):
        missed = (report.steps - report.served) / report.steps
        assert report.cost > least - missed  # what was missed was not paid for


def test_without_starts_it_is_the_mean_of_the_cheapest():
    assert bound_without_starts(market([[4], [1], [0]]), 4) == pytest.approx((0.3 + 0.825 + 1) / 3)


@pytest.mark.data
def test_what_an_all_knowing_schedule_pays_on_the_recorded_traces():
    assert bound_without_starts(recorded("aws1"), 4) == pytest.approx(0.32, abs=0.005)
    assert bound_without_starts(recorded("aws3"), 4) == pytest.approx(0.31, abs=0.005)
