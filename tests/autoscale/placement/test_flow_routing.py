"""Shares of requests against the flow; a full node gets none."""

from collections import Counter

import numpy as np
import pytest

from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_place import place
from autoscale.placement.flow_rates import LayerLoad, LayerPace, largest, span_rates
from autoscale.placement.flow_routing import FlowRouter, InterleavedRoundRobin
from autoscale.placement.spans_layout import Pool, SpanProblem, Stage


def test_draws_are_interleaved():
    """5:1:1 in seven draws: every choice as often as its weight, no run longer than three."""
    turns = InterleavedRoundRobin({"a": 5.0, "b": 1.0, "c": 1.0})
    drawn = [turns.draw() for _ in range(7)]
    assert Counter(drawn) == {"a": 5, "b": 1, "c": 1}
    assert all(drawn[n : n + 4] != ["a"] * 4 for n in range(4))


def test_shares_follow_weights_at_every_moment():
    weights = dict(zip("abcde", np.random.default_rng().uniform(0.1, 5, 5).tolist(), strict=True))
    turns, count = InterleavedRoundRobin(weights), Counter[str]()
    for draws in range(1, 2001):
        count[str(turns.draw())] += 1
        for choice, weight in weights.items():
            assert abs(count[choice] - draws * weight / sum(weights.values())) < len(weights)


def test_requests_take_the_shares_of_the_flow():
    stages = (Stage("a", (90.0, 45.0, 29.0)), Stage("b", (31.0, 14.0)))
    problem = SpanProblem(6, (Pool("a", 4), Pool("b", 7)), stages)
    flow = layout_flow(problem, place(problem).layout)
    router, count = FlowRouter(flow.links), Counter[tuple[str, str]]()
    for _ in range(10_000):
        path = router.pipeline(1)
        assert path is not None
        ends = ["source", *path, "sink"]
        count.update(zip(ends, ends[1:], strict=False))
    for link, tokens_per_s in flow.links.items():
        share = tokens_per_s / flow.tokens_per_s
        assert count[link] / 10_000 == pytest.approx(share, rel=0.02, abs=2e-3)


DIAMOND = {
    ("source", "a"): 3.0, ("source", "b"): 1.0, ("a", "c"): 3.0, ("b", "d"): 1.0,
    ("c", "sink"): 3.0, ("d", "sink"): 1.0,
}  # fmt: skip


def test_a_full_node_is_passed_over_and_taken_again_when_it_has_room():
    router = FlowRouter(DIAMOND, kv_tokens={"c": 100}, high_water=0.5)
    paths = [router.pipeline(25) for _ in range(6)]
    assert paths.count(["a", "c"]) == 2  # 50 tokens are the mark; a leads only to c
    assert paths.count(["b", "d"]) == 4
    assert router.held_tokens("c") == 50
    router.release(["a", "c"], 25)
    assert ["a", "c"] in [router.pipeline(25) for _ in range(2)]


def test_where_all_are_full_a_request_waits_and_holds_nothing():
    router = FlowRouter(DIAMOND, kv_tokens={"c": 10, "d": 10, "a": 50, "b": 50}, high_water=1.0)
    first, second = router.pipeline(10), router.pipeline(10)
    assert {str(first), str(second)} == {"['a', 'c']", "['b', 'd']"}
    assert router.pipeline(10) is None
    assert router.held_tokens("a") == 10


def test_layers_held_share_memory_and_time():
    """By hand: 10 bytes, 2 a layer, a request's keys and values 1 a layer; two layers in the model.
    One layer: 8 requests, 4 at a time, so 0.1 s for a prompt and 3 x 0.04 / 4 s for its tokens;
    two: 3 requests at a time."""
    load = LayerLoad(2.0, 0.1, 8.5, 3.0, usable=1.0)
    rates = span_rates(load, LayerPace(0.1, lambda batch: 0.01 * batch), 10.0, 2)
    assert rates == pytest.approx((3 / 0.13, 3 / (2 * 0.13)))
    slower = span_rates(load, LayerPace(0.1, lambda batch: 0.04, most_batch=2.0), 10.0, 2)
    assert slower == pytest.approx((3 / 0.16, 3 / (2 * 0.16)))


def test_no_layers_are_held_where_none_fit():
    load = LayerLoad(20.0, 0.1, 8.0, 4.0)
    assert span_rates(load, LayerPace(0.1, lambda batch: 1.0), 10.0, 2) == ()


def test_the_largest_batch_within_a_limit():
    assert largest(lambda batch: 1.0 + batch, 11.0) == pytest.approx(10.0)
    assert largest(lambda batch: 1.0 + batch, 1.5) == 0.0
