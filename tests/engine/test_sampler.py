"""The sampler against transformers' logits processors, and its draws against the distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.engine.cost import StepCost
from serve.engine.draws import uniform
from serve.engine.sampler import Draw, candidates, sample
from serve.engine.sequence import Sampling


def warped(logits, sampling):
    """transformers' scores of a row, in its order of processors, in float64."""
    scores = logits.double()[None]
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores[0]


def row(seed, vocab=200, scale=3.0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy((generator.normal(size=vocab) * scale).astype(np.float32))


@given(
    st.integers(0, 2**32),
    st.floats(0.05, 3),
    st.integers(0, 250),
    st.floats(0.01, 1),
    st.floats(0, 0.9),
)
def test_the_same_tokens_survive_as_in_transformers(seed, temperature, top_k, top_p, min_p):
    logits = row(seed)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    ids, probabilities = candidates(logits, sampling)
    wanted = warped(logits, sampling)
    assert ids.tolist() == wanted.isfinite().nonzero().squeeze(-1).tolist()
    torch.testing.assert_close(probabilities / probabilities.sum(), wanted.softmax(0)[ids])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.05)],
)
def test_the_draw_inverts_the_cumulative_distribution(sampling):
    logits = row(1)
    shares = warped(logits, sampling).softmax(0).numpy()
    for position in range(300):
        point = uniform(5, position)
        wanted = int(np.searchsorted(np.cumsum(shares), point, side="right"))
        seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, 5)
        assert sample(logits[None], [Draw(seeded, position)]) == [wanted]


def test_frequencies_follow_the_probabilities():
    """Chi-square over 20,000 draws; the bound is the 0.999 quantile for 9 degrees of freedom."""
    logits = row(2, vocab=10, scale=1.0)
    shares = logits.double().softmax(0).numpy()
    draws = [Draw(Sampling(seed=seed), 7) for seed in range(20_000)]
    counts = np.bincount(sample(logits.expand(20_000, 10), draws), minlength=10)
    assert float((((counts - 20_000 * shares) ** 2) / (20_000 * shares)).sum()) < 27.9


def test_a_token_does_not_depend_on_its_neighbours():
    draws = [
        Draw(Sampling(seed % 3 * 0.5, top_k=seed % 4 * 5, seed=seed), seed * 3, (seed,))
        for seed in range(12)
    ]
    logits = torch.stack([row(seed) for seed in range(12)])
    together = sample(logits, draws)
    assert together == [sample(logits[n : n + 1], [draw])[0] for n, draw in enumerate(draws)]
    assert together == sample(logits.flip(0), draws[::-1])[::-1]
    assert len(set(together)) > 6


def test_seed_and_position_change_the_token():
    logits = torch.zeros(1, 5000)
    by_seed = {sample(logits, [Draw(Sampling(seed=seed), 1)])[0] for seed in range(50)}
    by_position = {sample(logits, [Draw(Sampling(seed=1), at)])[0] for at in range(50)}
    assert len(by_seed) > 45 and len(by_position) > 45
    again = [sample(logits, [Draw(Sampling(seed=-(2**63)), 9)]) for _ in range(2)]
    assert again[0] == again[1]


def test_greedy_takes_the_largest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [9.0, 0.0, 0.0, 0.0]])
    assert sample(logits, [Draw(Sampling(temperature=0.0), 0)] * 2) == [1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-12])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    logits = row(3) * 100
    for seed in range(20):
        draw = Draw(Sampling(temperature, top_p=0.9, seed=seed), seed)
        assert sample(logits[None], [draw]) == [int(logits.argmax())]


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = row(4)
    for sampling in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-9), Sampling(2.0, top_p=0.0)):
        assert sample(logits[None], [Draw(sampling, 3)]) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_come_up(temperature):
    logits = torch.zeros(1, 6)
    logits[0, :3] = 50.0
    for seed in range(50):
        draw = Draw(Sampling(temperature, seed=seed), 0, (0, 1, 2, 10**9))
        assert sample(logits, [draw])[0] in (3, 4, 5)
    assert logits[0, :3].tolist() == [50.0] * 3, "the caller's logits were written to"


@pytest.mark.parametrize("point", [0.0, 1 - 2.0**-53])
def test_a_draw_at_either_end_never_takes_a_banned_token(monkeypatch, point):
    monkeypatch.setattr("serve.engine.sampler.uniform", lambda *_: point)
    for seed in range(50):
        drawn = sample(row(seed, vocab=9)[None], [Draw(Sampling(), 0, (0, 1, 7, 8))])
        assert drawn[0] in range(2, 7)


def test_logits_made_in_inference_mode_are_taken():
    """What the model returns may not be written to outside inference mode."""
    with torch.inference_mode():
        logits = row(5)[None] * 1.0
    assert sample(logits, [Draw(Sampling(0.0), 0, (int(logits.argmax()),))])


def test_draws_are_uniform_and_independent_of_stream_seed_and_position():
    for values in (
        [uniform(1, position) for position in range(10_000)],
        [uniform(seed, 1) for seed in range(10_000)],
        [uniform(1, 1, stream) for stream in range(10_000)],
    ):
        assert min(values) >= 0 and max(values) < 1
        counts, _ = np.histogram(values, bins=50, range=(0, 1))
        assert float(((counts - 200) ** 2 / 200).sum()) < 86  # chi-square, 49 degrees, 0.999
        assert abs(float(np.corrcoef(values[:-1], values[1:])[0, 1])) < 0.04


def test_a_draw_is_the_same_on_every_machine():
    """A pinned value: a change would break every stream that moves to a newer release."""
    assert uniform(0, 0) == 0.29553618758182676
    assert uniform(-1, 5, 2) == uniform(2**64 - 1, 5, 2)


@given(
    st.one_of(st.just(math.inf), st.floats(0.5, 1e6)),
    st.integers(0, 10**6),
    st.integers(0, 5000),
    st.floats(-1, 1),
)
def test_affordable_is_the_largest_that_fits(half, start, tokens, more):
    cost = StepCost(half)
    budget = max(cost.of(start, start + tokens) + more, 0.0)
    bought = cost.affordable(start, budget)
    assert bought >= 0 and cost.of(start, start + bought) <= budget
    assert cost.of(start, start + bought + 1) > budget


def test_cost_adds_up_and_grows_with_depth():
    cost = StepCost(100)
    assert cost.of(0, 100) == pytest.approx(cost.of(0, 40) + cost.of(40, 100))
    assert cost.of(500, 510) > cost.of(0, 10) > 10
    assert StepCost().of(500, 510) == 10
