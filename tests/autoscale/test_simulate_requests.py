"""Requests over replicas: waiting times against a plain queue, losses, and memory that stays
flat."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.simulate.market import made_market
from autoscale.simulate.replay import replay
from autoscale.simulate.requests import (
    Quantiles,
    ReplicaSpeed,
    Request,
    RequestLoad,
    daily_arrivals,
)
from autoscale.spot.basic import OnDemandPolicy, Refusals
from autoscale.spot.fleet import Node

OFFER = Offer("od", "g", 1, "r", "z", "on_demand", 1.0)
SPEED = ReplicaSpeed(slots=2, prompt_tokens_per_s=1000.0, token_s=0.05)


def nodes(*ids: int) -> list[Node]:
    return [Node(name, OFFER, 0.0, 0.0) for name in ids]


def arrivals(count: int, seed: int = 0, gap_s: float = 1.0) -> list[Request]:
    draws = np.random.default_rng(seed)
    times = np.cumsum(draws.exponential(gap_s, count))
    return [Request(float(at), 500, int(draws.integers(20, 120))) for at in times]


def test_waiting_is_that_of_a_plain_queue():
    """First come, first served on four slots: each takes the slot that is free first."""
    given = arrivals(500)
    load = RequestLoad(iter(given), SPEED)
    for step in range(60):
        load.advance(10.0 * step, 10.0 * step + 10.0, nodes(1, 2))
    load.advance(600.0, 5000.0, nodes(1, 2))
    free, whole = [0.0] * 4, []
    for request in given:
        start = max(request.arrival_s, min(free))
        free[free.index(min(free))] = start + 0.5 + request.output_tokens * 0.05
        whole.append(start + 0.5 + request.output_tokens * 0.05 - request.arrival_s)
    assert load.served == 500
    for share in (0.5, 0.9, 0.99):
        exact = float(np.quantile(whole, share, method="inverted_cdf"))
        assert exact <= load.whole_s.at(share) * 1.0001
        assert load.whole_s.at(share) <= exact * 1.021


@pytest.mark.parametrize("hand_over_s", [None, 0.5])
def test_what_a_lost_machine_served_is_served_elsewhere(hand_over_s: float | None):
    speed = ReplicaSpeed(2, 1000.0, 0.05, hand_over_s)
    load = RequestLoad(iter([Request(0.0, 1000, 200), Request(0.0, 1000, 100)]), speed)
    load.advance(0.0, 5.0, nodes(1))
    load.lost(5.0, nodes(1))  # four seconds of tokens made: 80 of each
    load.advance(5.0, 100.0, nodes(2))
    assert load.served == 2
    if hand_over_s is None:
        assert (load.restarted, load.moved) == (2, 0)
        assert load.lost_tokens == pytest.approx(160)
        expected = [5.0 + 11.0, 5.0 + 6.0]
    else:
        assert (load.restarted, load.moved, load.lost_tokens) == (0, 2, 0)
        expected = [5.0 + 0.5 + 120 * 0.05, 5.0 + 0.5 + 20 * 0.05]
    assert load.whole_s.at(1.0) == pytest.approx(max(expected), rel=0.021)
    assert load.whole_s.at(0.5) == pytest.approx(min(expected), rel=0.021)


def test_need_follows_the_busiest_of_the_last_steps():
    steady: Iterator[Request] = (Request(float(second), 0, 100) for second in range(3000))
    load = RequestLoad(steady, SPEED, filled=0.5, most=50)
    load.advance(0.0, 300.0, nodes(*range(20)))
    # 301 arrivals of 5 s in 300 s: 5 slots busy, 10 at half full, 5 machines of 2, rounded up
    assert load.need(300.0) in (5, 6)


def test_quantiles_are_within_two_percent():
    values = np.random.default_rng(1).lognormal(0, 1, 5000)
    kept = Quantiles()
    for value in values:
        kept.add(float(value))
    for share in (0.1, 0.5, 0.99):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert exact <= kept.at(share) <= exact * 1.0201


def peak_bytes(requests: int, steps: int) -> int:
    """Most memory while so many requests pass over a market of our own."""
    made = made_market(steps, ("e1a", "w1a"), depth=8, seed=3)
    tracemalloc.start()
    load = RequestLoad(daily_arrivals(requests, steps * 300.0, seed=1, swing=0.0), SPEED, most=6)
    replay(made, OnDemandPolicy(), Refusals(), load)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert load.served + load.waiting > 0.95 * requests
    return peak


def test_memory_does_not_grow_with_the_trace():
    peak_bytes(200, 20)  # caches fill once
    assert peak_bytes(16_000, 800) < 1.3 * peak_bytes(4_000, 200) + 200_000
