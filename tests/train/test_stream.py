"""Every sample once per epoch, in an order that workers and restarts do not change."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data.stream import SampleStream, share


def stream(tokens: int, length: int, seed: int = 3) -> SampleStream:
    return SampleStream(np.arange(tokens, dtype=np.uint32), length, seed)


@given(
    tokens=st.integers(9, 400),
    length=st.integers(2, 8),
    batch=st.integers(1, 13),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_sample_once_per_epoch_at_changing_world_sizes(tokens, length, batch, sizes, seed):
    """Steps of `batch` samples; each step may have another number of workers, each with a stream of
    its own, as after a restart."""
    seen: list[int] = []
    for step, size in enumerate(sizes):
        for rank in range(size):
            mine = share(step * batch, batch, rank, size)
            seen += stream(tokens, length, seed).ids(mine.first, mine.samples)
    samples = (tokens - 1) // length
    assert seen == stream(tokens, length, seed).ids(0, len(sizes) * batch)
    for start in range(0, len(seen), samples):
        epoch = seen[start : start + samples]
        counts = Counter(epoch)
        assert max(counts.values()) == 1
        if len(epoch) == samples:
            assert set(epoch) == set(range(samples))


@given(count=st.integers(0, 50), size=st.integers(1, 12), first=st.integers(0, 9))
def test_shares_are_whole_and_even(count, size, first):
    shares = [share(first, count, rank, size) for rank in range(size)]
    assert [n for s in shares for n in range(s.first, s.first + s.samples)] == list(
        range(first, first + count)
    )
    assert max(s.samples for s in shares) - min(s.samples for s in shares) <= 1


def test_samples_are_stretches_of_the_text():
    """Token ids are positions here, so a sample shows where it is from."""
    ids = stream(101, 10).ids(0, 25)
    batch = stream(101, 10).batch(0, 25)
    assert batch.shape == (25, 11) and batch.dtype == torch.int64
    for sample, row in zip(ids, batch.tolist(), strict=True):
        assert row == list(range(sample * 10, sample * 10 + 11))


def test_epochs_and_seeds_shuffle_differently():
    ids = stream(1001, 10).ids(0, 200)
    assert ids[:100] != ids[100:] and sorted(ids[:100]) == sorted(ids[100:])
    assert ids != stream(1001, 10, seed=4).ids(0, 200)
    assert ids[:100] != sorted(ids[:100])


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="sequence_tokens = 10"):
        stream(10, 10)


def test_an_order_with_a_repeated_sample_is_noticed(monkeypatch):
    """The mutation: drawing with replacement instead of shuffling."""
    check: Any = test_every_sample_once_per_epoch_at_changing_world_sizes
    inner = check.hypothesis.inner_test
    inner(200, 2, 5, [1, 3, 2] * 8, 1)
    monkeypatch.setattr(
        SampleStream, "_epoch", lambda self, epoch: np.arange(self.epoch_samples) // 2 * 2
    )
    with pytest.raises(AssertionError):
        inner(200, 2, 5, [1, 3, 2] * 8, 1)
