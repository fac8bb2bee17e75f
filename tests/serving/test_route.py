"""Routing by prefix and load: the index against brute force, and what it wins over least-loaded."""

import random

import pytest

from serve.engine.cost import StepCost
from serve.kv.prefix import CacheKey
from serve.prefixes import PlacedPrefixes
from serve.route import cheapest, least_loaded

KEY = CacheKey("tenant", "", "")
NAMES = ["a", "b", "c", "d"]
PAGE_TOKENS = 4


def shared_pages(left, right):
    common = next(
        (n for n, (x, y) in enumerate(zip(left, right, strict=False)) if x != y),
        min(map(len, (left, right))),
    )
    return min(common, len(right) - 1) // PAGE_TOKENS


def test_the_index_finds_what_brute_force_finds():
    chance = random.Random(1)
    index, placed = PlacedPrefixes(PAGE_TOKENS, 10_000), []
    for _ in range(300):
        tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 40))]
        whole = [t[: (len(t) - 1) // PAGE_TOKENS * PAGE_TOKENS] for t in placed]
        longest = max((shared_pages(t, tokens) for t in whole), default=0)
        hashes = index.hashes(KEY, tokens)
        assert index.cached_tokens("a", hashes) == longest * PAGE_TOKENS
        assert index.cached_tokens("a", index.hashes(CacheKey("other", "", ""), tokens)) == 0
        index.note("a", hashes)
        placed.append(tokens)


def test_memory_is_bounded_and_a_replica_that_is_gone_forgotten():
    index = PlacedPrefixes(PAGE_TOKENS, 5)
    old, new = (index.hashes(KEY, [n] * 17) for n in (1, 2))
    index.note("a", old)
    index.note("a", new)
    assert index.cached_tokens("a", new) == 16
    assert index.cached_tokens("a", old) == PAGE_TOKENS  # the head outlives its tail
    index.forget("a")
    assert index.cached_tokens("a", new) == 0


def test_a_hot_prefix_is_left_when_its_queue_costs_more():
    cached = {"a": 100}
    assert cheapest(NAMES, {"a": 100}, cached, 120, StepCost()).replica_id == "b"
    assert cheapest(NAMES, {"a": 99}, cached, 120, StepCost()).replica_id == "a"
    assert cheapest([], {}, {}, 1, StepCost()) is None


@pytest.mark.parametrize("seed", range(3))
def test_conversations_hit_more_than_least_loaded_and_stay_balanced(seed):
    def play(by_prefix):
        chance = random.Random(seed)
        index, open_work, work, hits = (
            PlacedPrefixes(PAGE_TOKENS, 4000),
            [],
            dict.fromkeys(NAMES, 0),
            0,
        )
        talks, asked = [[n] * 200 for n in range(40)], 0
        for _ in range(400):
            talk = chance.choice(talks)
            talk += [chance.randrange(99) for _ in range(40)]
            load = {r: sum(c for o, c in open_work[-8:] if o == r) for r in NAMES}
            hashes = index.hashes(KEY, talk)
            cached = {r: index.cached_tokens(r, hashes) for r in NAMES}
            chosen = least_loaded(NAMES, load)
            if by_prefix:
                chosen = cheapest(NAMES, load, cached, len(talk), StepCost()).replica_id
            cost = len(talk) - cached[chosen] + 64
            open_work.append((chosen, cost))
            work[chosen] += cost
            hits, asked = hits + cached[chosen], asked + len(talk)
            index.note(chosen, hashes)
        return hits / asked, max(work.values()) / (sum(work.values()) / 4)

    (rate, imbalance), (plain_rate, _) = play(True), play(False)
    print(f"hit rate {rate:.2f}, least-loaded {plain_rate:.2f}, imbalance {imbalance:.2f}")
    assert rate > plain_rate + 0.05
    assert imbalance < 1.5
