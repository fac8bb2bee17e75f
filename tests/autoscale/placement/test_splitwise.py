"""Schedules of a Splitwise cluster against what they come to by hand, and its designs in order."""

import numpy as np
import pytest

from autoscale.placement.goodput import Arrival, poisson
from autoscale.placement.splitwise import Cluster, Machine, MachineTimes, Outcome, times_from_rows
from autoscale.placement.splitwise_designs import (
    Design,
    Kind,
    best_split,
    throughput,
    within_limits,
)

# A prompt of n tokens takes n ms; a token 100 ms and 10 ms a request.
TIMES = MachineTimes(((0.0, 0.0), (1000.0, 1.0)), ((0.0, 0.1), (10.0, 0.2)))


def split(prompts: int, tokens: int, kv_tokens: int = 100_000) -> list[Machine]:
    return [Machine(TIMES, "prompt", kv_tokens) for _ in range(prompts)] + [
        Machine(TIMES, "token", kv_tokens) for _ in range(tokens)
    ]


def run(machines: list[Machine], *arrivals: Arrival, transfer_s: float = 0.0) -> list[Outcome]:
    return Cluster(machines, transfer_s=transfer_s).run(arrivals)


def test_phases_apart_by_hand():
    """Both prompts in one iteration of 1.5 s would start together; B comes during A's."""
    a, b = run(split(1, 1), Arrival(0.0, 1000, 3), Arrival(0.5, 500, 2))
    assert (a.ttft_s, b.ttft_s) == pytest.approx((1.0, 1.0))  # B from 1.0 to 1.5
    assert a.e2e_s == pytest.approx(1.0 + 2 * 0.11)
    assert b.e2e_s == pytest.approx(1.0 + 0.11)


def test_the_hand_over_takes_its_time():
    (outcome,) = run(split(1, 1), Arrival(0.0, 1000, 3), transfer_s=0.001)
    assert outcome.ttft_s == pytest.approx(1.0)
    assert outcome.tbt_s == pytest.approx((1.0 + 2 * 0.11) / 2)


def test_a_mixed_machine_computes_both_at_once_and_slower():
    """A's answer begins at 1.0; B's prompt joins the iteration after A's first token step."""
    a, b = run([Machine(TIMES, "mixed", 100_000)], Arrival(0.0, 1000, 4), Arrival(1.05, 99, 1))
    second_s = (99 + 1) / 1000 * 1.1  # of 99 prompt tokens and one token, a tenth slower
    assert b.ttft_s == pytest.approx(0.06 + second_s)
    assert a.e2e_s == pytest.approx(1.0 + 0.11 + second_s + 0.11)


def test_answers_wait_for_long_prompts_but_not_for_ever():
    """Prompts of 2048 tokens fill iterations of their own; an answer waits for four of them."""
    arrivals = [Arrival(0.0, 10, 2), *[Arrival(0.001, 2048, 1)] * 6]
    first, *_ = run([Machine(TIMES, "mixed", 100_000)], *arrivals)
    assert first.e2e_s == pytest.approx(0.01 + 4 * 2.048 + 0.11)


def test_prompts_join_the_shortest_queue():
    outcomes = run(split(2, 1), Arrival(0.0, 1000, 1), Arrival(0.0, 100, 1), Arrival(0.05, 100, 1))
    assert [o.ttft_s for o in outcomes] == pytest.approx([1.0, 0.1, 0.15])


def test_a_full_prompt_pool_borrows_a_token_machine_and_gives_it_back():
    """Nine long prompts: beyond 8192 queued tokens the token machine computes one, too."""
    arrivals = [Arrival(0.001 * n, 2000, 1) for n in range(9)]
    machines = split(1, 1)
    outcomes = run(machines, *arrivals)
    assert max(o.ttft_s for o in outcomes) < 9 * 2.0 * 0.75
    assert machines[1].pool == "token"
    few = run(split(1, 1), *arrivals[:4])  # not full: the prompt machine computes all
    assert max(o.ttft_s for o in few) == pytest.approx(4 * 2.0, abs=0.01)


def test_a_borrowed_machine_is_filled_before_another_is_borrowed():
    """Five prompts of 2 s fill the queue; the next two go to one token machine, not to both."""
    arrivals = [Arrival(0.001 * n, 2000, 1) for n in range(6)]
    outcomes = run(split(1, 2), *arrivals)
    assert [o.ttft_s for o in outcomes[4:]] == pytest.approx([2.0, 4.0], abs=0.01)


def test_memory_holds_answers_back():
    """Two answers of 12 tokens each where 20 fit: one after the other on the token machine; the
    prompt machine is borrowed for the second."""
    a, b = run(split(1, 1, kv_tokens=20), Arrival(0.0, 10, 2), Arrival(0.0, 10, 2))
    assert a.e2e_s < b.e2e_s or b.e2e_s < a.e2e_s
    with pytest.raises(ValueError, match="longer than the 20 tokens"):
        run(split(1, 1, kv_tokens=20), Arrival(0.0, 10, 11))


def test_every_request_ends_and_no_machine_keeps_anything():
    random = np.random.default_rng()
    lengths = [(int(p), int(t)) for p, t in zip(
        random.integers(1, 3000, 400), random.integers(1, 60, 400), strict=True)]  # fmt: skip
    machines = split(3, 2, kv_tokens=8000)
    outcomes = Cluster(machines).run(poisson(lengths, 2.0))
    assert all(o.e2e_s >= o.ttft_s > 0 for o in outcomes)
    for machine in machines:
        assert (machine.reserved, machine.held, machine.pending_tokens) == (0, 0, 0)
        assert machine.pool == machine.home and machine.idle


ROW = {"model": "m", "hardware": "h", "tensor_parallel": "8"}


def test_times_are_medians_and_lines():
    rows = [
        ROW | {"prompt_size": p, "batch_size": b, "prompt_time": t, "token_time": s}
        for p, b, t, s in (
            ("512", "1", "10", "5"), ("512", "1", "12", "6"), ("512", "1", "30", "7"),
            ("512", "4", "40", "9"), ("1024", "1", "20", "99"),
        )
    ]  # fmt: skip
    times = times_from_rows(rows, "m", "h", 8)
    assert times.prompt_s(512) == pytest.approx(0.012)
    assert times.prompt_s(1536) == pytest.approx(0.03)
    assert times.token_s(2) == pytest.approx(0.007)
    assert times.token_s(7) == pytest.approx(0.012)  # beyond the last point
    with pytest.raises(ValueError, match="no times of m on x"):
        times_from_rows(rows, "m", "x", 8)


def test_limits_are_at_three_percentiles():
    arrivals = [Arrival(0.0, 100, 2)] * 100
    at_ease = [Outcome(0.1, 0.11, 0.21)] * 100
    assert within_limits(arrivals, at_ease, TIMES)
    assert within_limits(arrivals, [*at_ease[:95], *[Outcome(0.5, 0.11, 0.3)] * 5], TIMES)
    assert not within_limits(arrivals, [*at_ease[:88], *[Outcome(0.5, 0.11, 0.3)] * 12], TIMES)
    assert not within_limits(arrivals, [*at_ease[:95], *[Outcome(0.7, 0.11, 0.3)] * 5], TIMES)


def test_more_machines_carry_more_and_a_split_is_found():
    kind = Kind(TIMES, 10_000)
    lengths = [(200, 10)] * 150

    def measure(design: Design) -> float:
        return throughput(design, lengths, TIMES, most=100.0)

    two, four = (measure(Design("mixed", mixed=(kind, n))) for n in (2, 4))
    assert 0 < two < four
    splits = [Design("apart", (kind, p), (kind, 8 - p)) for p in range(1, 8)]
    found = best_split(splits, measure)
    assert found[1] == pytest.approx(max(measure(each) for each in splits))
