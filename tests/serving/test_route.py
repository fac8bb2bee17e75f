"""Routing by prefix and load: the index against brute force, and what it wins over least-loaded."""

import random
from typing import NamedTuple

import pytest

from serve.engine.cost import StepCost
from serve.kv.prefix import CacheKey
from serve.prefixes import PlacedPrefixes
from serve.route import cheapest

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
    index = PlacedPrefixes(PAGE_TOKENS, 10_000)
    placed: list[list[int]] = []
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


def least_loaded(load: dict[str, int]) -> str:
    return min(NAMES, key=lambda name: (load.get(name, 0), name))


def chosen(load: dict[str, int], cached: dict[str, int], prompt_tokens: int) -> str:
    choice = cheapest(NAMES, load, cached, prompt_tokens, StepCost())
    assert choice is not None
    return choice.replica_id


def test_a_hot_prefix_is_left_when_its_queue_costs_more():
    cached = {"a": 100}
    assert chosen({"a": 100}, cached, 120) == "b"
    assert chosen({"a": 99}, cached, 120) == "a"
    assert cheapest([], {}, {}, 1, StepCost()) is None


class Played(NamedTuple):
    """Tokens found cached of those asked, and the busiest replica's work over the mean."""

    hit_rate: float
    imbalance: float


def play(seed: int, by_prefix: bool) -> Played:
    """400 turns of 40 conversations over four replicas, the last eight turns still open."""
    chance, index = random.Random(seed), PlacedPrefixes(PAGE_TOKENS, 4000)
    talks = [[n] * 200 for n in range(40)]
    turns: list[tuple[str, int]] = []
    hits = asked = 0
    for _ in range(400):
        talk = chance.choice(talks)
        talk += [chance.randrange(99) for _ in range(40)]
        load = {r: sum(cost for other, cost in turns[-8:] if other == r) for r in NAMES}
        hashes = index.hashes(KEY, talk)
        cached = {r: index.cached_tokens(r, hashes) for r in NAMES}
        replica = chosen(load, cached, len(talk)) if by_prefix else least_loaded(load)
        assert replica is not None
        turns.append((replica, len(talk) - cached[replica] + 64))
        hits, asked = hits + cached[replica], asked + len(talk)
        index.note(replica, hashes)
    work = [sum(cost for other, cost in turns if other == r) for r in NAMES]
    return Played(hits / asked, max(work) / (sum(work) / len(work)))


@pytest.mark.parametrize("seed", range(3))
def test_conversations_hit_more_than_least_loaded_and_stay_balanced(seed: int):
    placed, plain = play(seed, by_prefix=True), play(seed, by_prefix=False)
    assert placed.hit_rate > plain.hit_rate + 0.05
    assert placed.imbalance < 1.5
