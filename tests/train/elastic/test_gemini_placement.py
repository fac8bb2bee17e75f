"""Who holds whose share, against the paper's figures and every set of losses there is."""

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.stream import share
from train.elastic.messages import Held, Version
from train.elastic.peers import parts
from train.elastic.trainee import Flat
from train.resilience.gemini import (
    fatal_by_enumeration,
    fatal_sets,
    holders,
    newest_whole,
    survives,
)


@pytest.mark.parametrize("workers", range(6, 13))
@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_closed_form_is_the_count_of_every_failure_set(workers: int, copies: int):
    for losses in range(workers + 1):
        brute = sum(
            any(all(rank in lost for rank in kept) for kept in holders(workers, copies))
            for lost in map(set, combinations(range(workers), losses))
        )
        assert fatal_sets(workers, copies, losses) == brute
        assert fatal_by_enumeration(workers, copies, losses) == brute


def test_the_papers_probabilities():
    """SOSP 23: 16 machines, two copies: 93.3 % for two lost machines, 80.0 % for three."""
    assert 1 - fatal_sets(16, 2, 2) / comb(16, 2) == pytest.approx(0.933, abs=5e-4)
    assert 1 - fatal_sets(16, 2, 3) / comb(16, 3) == pytest.approx(0.800, abs=5e-4)


def test_groups_are_better_than_a_ring():
    """The placement matters: a ring alone, the obvious other choice, survives less."""
    ring = [(rank, (rank + 1) % 12) for rank in range(12)]
    for losses in range(2, 7):
        sets = list(combinations(range(12), losses))
        ring_fatal = sum(not survives(ring, lost) for lost in sets)
        assert fatal_sets(12, 2, losses) < ring_fatal


@given(st.integers(1, 40), st.data())
def test_every_share_has_its_copies_and_every_worker_its_load(workers: int, data: st.DataObject):
    copies = data.draw(st.integers(1, workers))
    placement = holders(workers, copies)
    assert [kept[0] for kept in placement] == list(range(workers))
    assert all(len(set(kept)) == copies for kept in placement)
    load = [sum(rank in kept for kept in placement) for rank in range(workers)]
    assert load == [copies] * workers, "nobody keeps more than the others"


@pytest.mark.parametrize("copies", [0, 5])
def test_impossible_copies_are_refused(copies: int):
    with pytest.raises(ValueError, match="1 to 4 are accepted"):
        holders(4, copies)


def held(step: int, shards: int, *indexes: int) -> list[Held]:
    version = Version(step=step, samples=10 * step, shards=shards)
    return [Held(version=version, index=index) for index in indexes]


def test_the_newest_whole_version_is_chosen():
    survivors = [held(8, 3, 0, 1) + held(7, 3, 0, 1), held(7, 3, 1, 2)]
    found, missing = newest_whole(survivors)
    assert found == Version(step=7, samples=70, shards=3) and missing == ()
    found, _ = newest_whole([*survivors, held(8, 3, 2)])
    assert found is not None and found.step == 8


def test_what_nobody_holds_is_named():
    found, missing = newest_whole([held(8, 4, 0, 1), held(8, 4, 1)])
    assert found is None
    assert [sentence.split(":")[0] for sentence in missing] == [
        "share 2 of 4 after step 8",
        "share 3 of 4 after step 8",
    ]
    assert newest_whole([[], []]) == (None, ("no worker holds any state",))


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 9))
def test_recutting_moves_every_element_once(length: int, old: int, new: int):
    import torch

    moved = parts({"v": Flat(length, torch.float64)}, old, new)
    arrived: dict[int, int] = {}
    for part in moved:
        for element in range(part.first, part.first + part.elements):
            arrived[element] = arrived.get(element, 0) + 1
            mine, theirs = share(0, length, part.rank, new), share(0, length, part.share, old)
            assert mine.first <= element < mine.first + mine.samples
            assert theirs.first <= element < theirs.first + theirs.samples
    assert arrived == {element: 1 for element in range(length)}
