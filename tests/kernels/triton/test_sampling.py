"""The kernel of sampling: the tokens that the reference keeps, each as often as it should be."""

import pytest
import torch

from kernels.reference import sampling as reference
from kernels.triton.sampling import sample
from tests.kernels.triton.conformance import DEVICE, conforms, every, normal, watched


@pytest.mark.parametrize(("case", "target", "rows", "dtype"), every("sampling"))
def test_is_what_the_oracle_says(case, target, rows, dtype):
    conforms(case, target, rows, dtype)


def run(logits, temperature, top_k, top_p, uniform):
    """Single settings are those of all rows."""
    rows = logits.shape[0]
    given = [
        torch.as_tensor(each, dtype=dtype, device=logits.device).expand(rows)
        for each, dtype in (
            (temperature, torch.float32),
            (top_k, torch.int64),
            (top_p, torch.float32),
            (uniform, torch.float32),
        )
    ]
    with watched():
        got = sample(logits, *given)
    return got, reference.sample(logits, *given)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (7, 0.6), (1, 0.0)])
def test_the_kept_tokens_are_the_references(top_k, top_p):
    """One row, drawn from at 6 places between 0 and 1; few values, so that many are equal."""
    logits = whole_numbers(29).expand(6, 29)
    uniform = (torch.arange(6.0) + 0.37) / 6
    got, wanted = run(logits, 0.7, top_k, top_p, uniform)
    assert torch.equal(got, wanted)


def whole_numbers(count: int) -> torch.Tensor:
    return (normal(count) * 1.3).round() + 0.0


def test_a_row_of_several_chunks():
    """Ties on both sides of a chunk's end, at the k-th value and at the last of the top p."""
    logits = normal(4, 2500)
    logits[:, 1020:1030] = 2.5
    logits[1] = -3
    logits[3] = (logits[3] * 4).round() / 4
    got, wanted = run(logits, 1.0, [60, 1500, 0, 100], [1, 1, 0.52, 0.7], [0.7, 0.99, 0.4, 0.8])
    assert torch.equal(got, wanted)
    assert got[1] > 1024


def test_greedy_takes_the_first_of_equals():
    logits = normal(3, 50)
    logits[0, 17] = logits[0, 31] = 9
    logits[1] = -0.0
    logits[1, 5:] = 0.0
    logits[2] = -torch.inf
    logits[2, 44] = -1e30
    for settings in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.0)):
        got, wanted = run(logits, *settings, 0.999)
        assert torch.equal(got, wanted) and got.tolist() == [17, 0, 44]


def test_zeros_of_both_signs_are_equal():
    """So that of two the first by id is kept, whichever sign it has."""
    logits = torch.tensor([[-5, -0.0, 0.0, -0.0, -9]], device=DEVICE).expand(3, 5)
    got, wanted = run(logits, 1.0, 2, 1.0, [0.0, 0.4, 0.9])
    assert got.tolist() == wanted.tolist() == [1, 1, 2]


def test_a_sum_that_is_reached_exactly_is_not_exceeded():
    logits = torch.tensor([[-torch.inf, 2, 2, -torch.inf, 2, 2]], device=DEVICE).expand(4, 6)
    got, wanted = run(logits, 1.0, 0, 1.0, [0.0, 0.25, 0.5, 0.99999994])
    assert got.tolist() == wanted.tolist() == [1, 2, 4, 5]


def test_a_top_p_of_almost_1_keeps_no_more_than_the_top_k():
    """Settings for which sums in float32 come out so that one more of the equal tokens is missing
    to the top p; the draw would hit that one."""
    logits = torch.zeros(4, 60, device=DEVICE)
    logits[:, 59] = 1
    top_k, heat = [7, 7, 57, 58], [12 / 13, 1.1307692307692307, 0.7153846153846154, 12 / 13]
    each = (-1 / torch.tensor(heat)).exp()
    count = torch.tensor(top_k)
    beyond = (count - 0.5) * each / (count * each + 1)
    got, wanted = run(logits, heat, top_k, 0.99999994, beyond)
    assert torch.equal(got, wanted) and not (got.cpu() == count - 1).any()


def test_extreme_numbers():
    """A temperature that leaves one token, values at the end of float32, no end of -inf."""
    logits = normal(3, 40)
    logits[1] *= 1e37
    logits[2, 1:] = -torch.inf
    got, wanted = run(logits, [1e-6, 1e36, 1.0], [5, 0, 9], [0.9, 0.9, 0.5], 0.5)
    assert torch.equal(got, wanted)


def test_halves_are_sampled_as_float32():
    logits = normal(4, 60, dtype=torch.bfloat16)
    uniform = [0.1, 0.35, 0.6, 0.85]
    got, wanted = run(logits, 0.9, 20, 0.9, uniform)
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="sample on a GPU computes in float16"):
        run(logits.double(), 1.0, 0, 1.0, 0.5)


@pytest.mark.slow
def test_frequencies_are_the_probabilities():
    """Evenly spaced chance gives each kept token its share of the draws."""
    draws, logits = 400, normal(6)
    uniform = (torch.arange(float(draws)) + 0.5) / draws
    got, _ = run(logits.expand(draws, 6), 1.0, 4, 1.0, uniform)
    kept = logits.topk(4)
    share = torch.zeros(6, device=DEVICE).scatter(0, kept.indices, kept.values.softmax(0))
    assert (got.bincount(minlength=6) / draws - share).abs().max() <= 1.5 / draws
