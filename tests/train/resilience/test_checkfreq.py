"""CheckFreq's interval is the paper's, found from measurements, and keeps its budget."""

import random
from fractions import Fraction
from math import ceil

import pytest

from train.resilience.checkfreq import CheckFreq, interval


def test_the_formula():
    """Against the definition in exact numbers: the least k for which a checkpoint is durable within
    k iterations and costs at most the budget."""
    chance = random.Random(1)
    for _ in range(2000):
        t_iter, t_persist, overhead = (chance.randint(1, 400) for _ in range(3))
        percent = chance.randint(1, 50)
        wanted = next(
            k
            for k in range(1, 10**6)
            if k * t_iter >= t_persist and Fraction(overhead, k * t_iter) <= Fraction(percent, 100)
        )
        found = interval(t_iter, t_persist, overhead, percent / 100)
        assert found in (wanted, wanted + 1)  # one more where a double is a hair above a whole
        if overhead == 0:
            assert found == max(1, ceil(t_persist / t_iter))


def run(budget: float, divisor: int, cost: float, seed: int) -> float:
    """Slowdown of 4000 iterations of about 1 s in virtual time, whose checkpoints take 5.5 s and
    cost `cost` s spread over the iterations in that time; at the policy's interval / divisor."""
    chance = random.Random(seed)
    policy = CheckFreq(budget)
    quiet = total = 0.0
    begun, left, due = -1, 0, 8
    for step in range(4000):
        base = chance.gauss(1.0, 0.02)
        busy = left > 0
        spent = base + (cost / 6 if busy else 0.0)
        policy.iteration(spent, busy)
        quiet, total = quiet + base, total + spent
        if busy:
            left -= 1
            if not left:
                policy.persisted(5.5)
                due = begun + max(6, policy.interval() // divisor)
        if step >= due and not left:
            begun, left = step, 6
    return total / quiet - 1


@pytest.mark.parametrize("budget", [0.01, 0.035, 0.1])
@pytest.mark.parametrize("cost", [1.5, 4.0])
def test_the_budget_is_kept_and_used(budget: float, cost: float):
    slowdown = run(budget, 1, cost, seed=3)
    assert slowdown <= budget
    assert slowdown >= 0.6 * min(budget, cost / 9)


@pytest.mark.parametrize("budget", [0.01, 0.035])
def test_four_times_as_often_is_too_often(budget: float):
    """The mutation."""
    assert run(budget, 4, 4.0, seed=3) > 2 * budget


def test_it_follows_what_changes():
    policy = CheckFreq(0.05)
    for _ in range(20):
        policy.iteration(1.0, False)
    for cost in [0.2] * 5 + [2.0] * 5:
        policy.iteration(1.0 + cost, True)
        policy.persisted(1.0)
        if cost == 0.2:
            before = policy.interval()
    assert (before, policy.interval()) == (5, 50)


def test_a_budget_is_a_share():
    with pytest.raises(ValueError, match="budget = 0"):
        CheckFreq(0)
    with pytest.raises(ValueError, match="budget = 3.5"):
        CheckFreq(3.5)
