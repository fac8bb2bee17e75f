"""Allocator waste and prefix hits on real traces, and on synthetic ones of the same kind."""

import random

import pytest

from tests.kv import replay

needs_azure = pytest.mark.skipif(
    not replay.AZURE_CODE.is_file(), reason="the Azure code trace is not at ../shared/data"
)
needs_mooncake = pytest.mark.skipif(
    not replay.MOONCAKE.is_file(), reason="the Mooncake trace is not at ../shared/data"
)


def synthetic_lengths(requests: int) -> list[replay.Arrival]:
    """Long prompts, short answers, bursts: the shape of the code trace, not its numbers."""
    rng = random.Random(5)
    now_s, arrivals = 0.0, []
    for _ in range(requests):
        now_s += rng.expovariate(0.2 if rng.random() < 0.1 else 5.0)
        prompt, output = int(rng.lognormvariate(7.2, 0.8)) + 3, int(rng.expovariate(1 / 28)) + 6
        arrivals.append(replay.Arrival(now_s, prompt, output))
    return arrivals


def synthetic_hashes(requests: int) -> list[list[int]]:
    """Conversations that grow turn by turn over a few shared system prompts."""
    rng, fresh = random.Random(6), iter(range(10**9))
    talks = [[next(fresh) for _ in range(rng.randrange(1, 30))] for _ in range(4)]
    turns = []
    for _ in range(requests):
        talk = list(rng.choice(talks[-60:] + talks[:4]))
        talk += [next(fresh) for _ in range(rng.randrange(0, 12))]
        talks.append(talk)
        turns.append(talk)
    return turns


def test_waste_by_hand():
    arrivals = [replay.Arrival(0.0, 15, 2)]  # 15, 16, 17 tokens: 1, 1, 2 pages
    waste = replay.replay_lengths(arrivals, page_tokens=16)
    assert waste.mean == pytest.approx((1 / 16 + 0 + 15 / 32) / 3)
    assert waste.overall == pytest.approx(1 - 48 / 64)
    assert waste.peak_pages == 2


def test_allocator_waste_on_synthetic_lengths():
    arrivals = synthetic_lengths(600)
    waste = replay.replay_lengths(arrivals)
    assert 0 < waste.mean < 0.04 and 0 < waste.overall < 0.04
    assert waste.reserved > 0.6, "reserving the longest wastes most of it"
    coarse = replay.replay_lengths(arrivals[:200], page_tokens=512)
    assert coarse.mean > 0.04, "large pages must show up as waste"


@pytest.mark.data
@needs_azure
def test_allocator_waste_on_the_azure_code_trace():
    waste = replay.replay_lengths(replay.read_azure())
    assert waste.requests == 8819
    assert waste.mean < 0.04 and waste.overall < 0.04


def test_hits_by_hand():
    requests = [[1, 2, 3], [1, 2, 4], [2, 3], [1, 2, 3, 5]]
    assert replay.replay_hashes(requests) == (5, 12) == replay.count_hashes(requests)
    assert replay.replay_hashes(requests, capacity=0) == (0, 12)


def test_hits_on_synthetic_conversations():
    requests = synthetic_hashes(800)
    infinite = replay.replay_hashes(requests)
    assert infinite == replay.count_hashes(requests)
    ratios = [replay.replay_hashes(requests, capacity).ratio for capacity in (100, 1000, 10**6)]
    assert 0 < ratios[0] < ratios[1] < ratios[2] == infinite.ratio


@pytest.mark.data
@needs_mooncake
def test_hits_on_the_mooncake_trace():
    requests = replay.read_mooncake()
    hits = replay.replay_hashes(requests)
    assert hits == replay.count_hashes(requests) == (77_953, 121_877)
    assert round(hits.ratio, 4) == 0.6396
