"""Tokens are drawn as their probabilities say, from the set that transformers would keep."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kernels.ops.sampling import sample

DRAWS = 20_000
# The 99.9th percentile of chi-square with 7 degrees of freedom.
LARGEST = 24.3


def draw(logits: torch.Tensor, uniform: torch.Tensor, heat=1.0, top_k=0, top_p=1.0):
    """One row of logits [V], once for each of uniform [n]."""
    rows = uniform.shape[0]
    return sample(
        logits.expand(rows, -1),
        torch.full((rows,), heat),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        uniform,
    )


def chances(seed: int = 0) -> torch.Tensor:
    return torch.rand(DRAWS, generator=torch.Generator().manual_seed(seed))


def chi_square(ids: torch.Tensor, wanted: torch.Tensor) -> float:
    counts = torch.bincount(ids, minlength=len(wanted)).double()
    assert counts.sum() == DRAWS and not counts[wanted == 0].any()
    expected = (wanted * DRAWS)[wanted > 0]
    return float(((counts[wanted > 0] - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, -0.4, 1.7, 0.9])


@pytest.mark.parametrize("heat", [0.7, 1.0, 2.5])
def test_draws_follow_the_distribution(heat: float):
    wanted = (LOGITS.double() / heat).softmax(0)
    ids = draw(LOGITS, chances(), heat)
    assert chi_square(ids, wanted) < LARGEST
    # The test would see a temperature that is a tenth off.
    assert chi_square(draw(LOGITS, chances(), heat * 1.1), wanted) > LARGEST


def warped(logits: torch.Tensor, heat: float, top_k: int, top_p: float):
    """Probabilities after transformers' processors, in the order it applies them."""
    scores = TemperatureLogitsWarper(heat)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].softmax(0)


@pytest.mark.parametrize("top_k", [0, 1, 3, 8])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.2])
def test_draws_from_a_kept_set_follow_transformers(top_k: int, top_p: float):
    wanted = warped(LOGITS.double(), 0.8, top_k, top_p)
    assert chi_square(draw(LOGITS, chances(1), 0.8, top_k, top_p), wanted) < LARGEST


def test_the_kept_set_is_the_one_of_transformers():
    """Random rows; every kept token is reached by a fine enough grid of chances."""
    chance = torch.Generator().manual_seed(2)
    grid = torch.arange(0, 1, 1 / 1024)
    for row in range(6):
        logits = torch.randn(29, generator=chance, dtype=torch.float64) * 1.5
        top_k, top_p = [0, 5, 17][row % 3], [1.0, 0.85, 0.5, 0.97][row % 4]
        wanted = warped(logits, 1.2, top_k, top_p)
        seen = draw(logits, grid, 1.2, top_k, top_p).unique()
        likely = (wanted > 2 / 1024).nonzero()[:, 0]
        assert set(likely.tolist()) <= set(seen.tolist()) <= set(wanted.nonzero()[:, 0].tolist())


def test_temperature_zero_is_the_largest_logit_and_of_equals_the_first():
    logits = torch.randn(64, 37, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(4))
    rows = torch.zeros(64), torch.zeros(64, dtype=torch.int64), torch.ones(64), uniform
    assert torch.equal(sample(logits, *rows), logits.argmax(-1))
    logits[:, [5, 20, 30]] = 9
    assert (sample(logits, *rows) == 5).all()


def test_the_ends_of_chance_are_the_first_and_the_last_kept_token():
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert draw(LOGITS, ends).tolist() == [0, 7]
    assert draw(LOGITS, ends, top_k=3).tolist() == [2, 6]
    assert draw(LOGITS, ends, top_p=0.0).tolist() == [2, 2]
    # A sum that is reached exactly is not exceeded.
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert draw(torch.zeros(4), quarters).tolist() == [0, 1, 2, 3]
    forbidden = LOGITS.clone()
    forbidden[[0, 7]] = -torch.inf
    assert draw(forbidden, ends).tolist() == [1, 6]


def test_ties_at_the_edge_are_cut_by_id():
    """Equal logits: the first k by id are kept, and no more."""
    equal = torch.zeros(6)
    grid = torch.arange(0, 1, 1 / 64)
    assert draw(equal, grid, top_k=2).unique().tolist() == [0, 1]
    assert draw(equal, grid, top_p=0.5).unique().tolist() == [0, 1, 2]
    assert draw(equal, grid, top_k=4, top_p=0.5).unique().tolist() == [0, 1]


def test_rows_are_drawn_alike_in_any_order():
    chance = torch.Generator().manual_seed(5)
    logits = torch.randn(17, 37, generator=chance)
    heat, top_p, uniform = (torch.rand(17, generator=chance) for _ in range(3))
    top_k = torch.randint(0, 40, (17,), generator=chance)
    ids = sample(logits, heat, top_k, top_p, uniform)
    turned = torch.randperm(17, generator=chance)
    again = sample(logits[turned], heat[turned], top_k[turned], top_p[turned], uniform[turned])
    assert torch.equal(again, ids[turned])


def test_very_cold_and_very_large_logits_are_drawn_too():
    assert draw(LOGITS, torch.tensor([0.5]), heat=1e-4).item() == 2
    assert draw(LOGITS * 1e30, torch.tensor([0.5])).item() == 2
