"""The backlog: its cap, its 429 with an honest time to come back, and fair turns."""

import random

import pytest

from serve.backlog import Backlog, Turns
from serve.engine.sequence import Limits, Request, Sampling
from serve.errors import RequestError
from serve.kv.prefix import CacheKey


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time_s = 7.0

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, duration_s: float) -> None:
        raise AssertionError("nothing sleeps here")


def asked(
    name: str, tokens: int, tenant: str = "a", share: float = 1.0, group: str = ""
) -> Request:
    key = CacheKey(tenant, "", "")
    prompt = (1,) * tokens
    return Request(name, prompt, Sampling(), Limits(5), key, group=group, share=share)


def refused(backlog: Backlog, request: Request) -> RequestError:
    with pytest.raises(RequestError) as caught:
        backlog.enter(request)
    assert (caught.value.status, caught.value.type) == (429, "rate_limit_error")
    return caught.value


def test_work_that_could_start_now_is_let_in_whatever_its_size():
    backlog = Backlog(100, 2, Hand())
    backlog.enter(asked("huge", 500))
    error = refused(backlog, asked("next", 1))
    assert "500 prompt tokens" in error.message and "100" in error.message


def test_tokens_and_requests_are_capped_and_freed():
    backlog = Backlog(100, 3, Hand())
    for n in range(3):
        backlog.enter(asked(f"r{n}", 10))
    refused(backlog, asked("r3", 10))
    backlog.leave("r1")
    backlog.leave("r1")
    backlog.enter(asked("r3", 10))
    backlog.leave("r0")
    refused(backlog, asked("r4", 81))
    backlog.enter(asked("r4", 80))
    assert (backlog.tokens, backlog.requests, backlog.refused) == (100, 3, 2)
    for name in ("r2", "r3", "r4"):
        backlog.leave(name)
    assert (backlog.tokens, backlog.requests) == (0, 0)


def test_retry_after_is_the_excess_at_the_measured_rate():
    clock = Hand()
    backlog = Backlog(1000, 100, clock)
    backlog.enter(asked("first", 400))
    clock.time_s += 2.0  # 150 tokens of it were cached: 125 tokens a second
    backlog.started("first", 150)
    backlog.started("first", 150)
    clock.time_s += 100.0  # an idle time, which says nothing about the rate
    backlog.enter(asked("a", 600))
    backlog.enter(asked("b", 400))
    assert backlog.prefill_tokens_per_s == pytest.approx(125)
    assert refused(backlog, asked("c", 500)).retry_after_s == pytest.approx(500 / 125)
    assert refused(backlog, asked("d", 10)).retry_after_s == 1.0


def test_a_tenant_within_its_share_is_let_in_when_another_fills_the_queue():
    backlog = Backlog(1000, 100, Hand())
    for n in range(10):
        backlog.enter(asked(f"flood {n}", 100, "flood"))
    refused(backlog, asked("flood 10", 100, "flood"))
    for n in range(5):  # an equal part of two
        backlog.enter(asked(f"b {n}", 100, "b"))
    refused(backlog, asked("b 5", 100, "b"))
    for n in range(6):  # 3 of 5 parts
        backlog.enter(asked(f"c {n}", 100, "c", share=3.0))
    refused(backlog, asked("c 6", 100, "c", share=3.0))


def test_a_further_choice_costs_a_token():
    backlog = Backlog(1000, 100, Hand())
    backlog.enter(asked("n", 100, group="n"))
    backlog.enter(asked("n-1", 100, group="n"))
    assert backlog.tokens == 101


def test_turns_of_one_tenant_are_in_order_of_arrival():
    turns = Turns()
    made = [turns.take("a", 1.0, tokens) for tokens in (5, 1, 50, 2)]
    assert made == sorted(made)


def served(shares: dict[str, float], weights: dict[str, int], seed: int = 0) -> list[str]:
    """Who was served, token by token, when everybody has much waiting; weights: prompt sizes."""
    rng, turns = random.Random(seed), Turns()
    waiting = [
        (turns.take(tenant, shares[tenant], size), n, tenant, size)
        for n in range(200)
        for tenant in shares
        for size in [rng.randint(1, 2 * weights[tenant] - 1)]
    ]
    order = []
    for turn, _, tenant, size in sorted(waiting):
        turns.reached(turn)
        order.extend([tenant] * size)
    return order


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}),
        ({"a": 1.0, "b": 1.0}, {"a": 5, "b": 50}),
        ({"a": 1.0, "b": 3.0}, {"a": 20, "b": 20}),
    ],
)
def test_tokens_are_shared_by_weight_while_all_have_work(shares, sizes):
    order = served(shares, sizes)
    alone = max(order[::-1].index(tenant) for tenant in shares)  # the end, when one has no more
    both = order[: len(order) - alone]
    part = both.count("b") / len(both)
    assert part == pytest.approx(shares["b"] / sum(shares.values()), abs=0.05)


def test_a_late_tenant_does_not_stand_behind_a_flood_nor_make_up_for_its_absence():
    turns = Turns()
    flood = [turns.take("flood", 1.0, 100) for _ in range(50)]
    turns.reached(flood[10])
    late = [turns.take("late", 1.0, 100) for _ in range(50)]
    assert late[0] == flood[10]
    assert sum(turn < late[5] for turn in flood[11:]) == 4
