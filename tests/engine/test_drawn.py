"""Rows drawn all at once are those drawn one by one, with every term, and none knows of another."""

from collections import Counter
from typing import Any

import pytest
import torch

from serve.engine.drawn import drawn
from serve.engine.sampler import Draw, sample_row
from serve.engine.sequence import Sampling
from tests.models.device_models import DEVICE

VOCAB = 300
TERMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_k": VOCAB + 10},
    {"top_p": 0.7},
    {"top_p": 0.0001},
    {"min_p": 0.1},
    {"temperature": 2.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


def rows(seed: int) -> torch.Tensor:
    """Logits with ties, and a token that is forbidden."""
    chance = torch.Generator().manual_seed(seed)
    made = (torch.randn(len(TERMS), VOCAB, generator=chance) * 8).round() / 2
    made[:, 7] = -torch.inf
    return made


def draws(seed: int) -> list[Draw]:
    return [
        Draw(Sampling(seed=100 * seed + n, **{"temperature": 1.0, **term}), 10 + n)
        for n, term in enumerate(TERMS)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_tokens_are_those_of_rows_alone(seed: int):
    logits, asked = rows(seed), draws(seed)
    alone = [sample_row(logits[n], draw) for n, draw in enumerate(asked)]
    assert drawn(logits.to(DEVICE), asked) == alone
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = drawn(logits[order].to(DEVICE), [asked[n] for n in order])
    assert shuffled == [alone[n] for n in order]


def test_frequencies_are_the_probabilities():
    """Of three tokens; the terms cut off a fourth."""
    logits = torch.tensor([[1.0, 0.0, -1.0, -9.0]]).log_softmax(1)
    count = 4000
    asked = [Draw(Sampling(temperature=1.0, top_k=3, seed=5), place) for place in range(count)]
    found = Counter(drawn(logits.expand(count, -1).to(DEVICE), asked))
    wanted = logits[0, :3].double().softmax(0)
    assert set(found) == {0, 1, 2}
    for token in range(3):
        share = float(wanted[token])
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(found[token] / count - share) < 4 * deviation


def test_a_term_that_is_dropped_is_seen():
    """The comparison above can fail: other terms give other tokens."""
    logits, asked = rows(3), draws(3)
    plain = [Draw(Sampling(temperature=1.0, seed=d.sampling.seed), d.position) for d in asked]
    assert drawn(logits, plain) != drawn(logits, asked)


def test_a_point_past_the_last_token_is_the_last_that_may_come(monkeypatch: pytest.MonkeyPatch):
    """Rounding may put a draw at the very end of the sum, behind which stand forbidden tokens."""
    monkeypatch.setattr("serve.engine.drawn.uniform", lambda *_: 1.0)
    logits = torch.tensor([[0.0, 1.0, 0.5, -torch.inf, -torch.inf]])
    assert drawn(logits, [Draw(Sampling(temperature=1.0), 3)]) == [2]
