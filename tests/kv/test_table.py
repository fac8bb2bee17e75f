"""Page tables: growth, slots, forks that copy exactly what is written, release."""

import numpy as np
import pytest

from serve.kv.pool import PagePool
from serve.kv.table import PageTable
from tests.kv.model import Contents


def grown(pool: PagePool, tokens: int) -> PageTable:
    table = PageTable(pool)
    assert table.grow(tokens)
    return table


def test_growth_is_by_whole_pages_and_all_or_nothing():
    pool = PagePool(4, 16)
    table = PageTable(pool)
    assert table.capacity_tokens == 0 and table.pages_missing(0) == 0 and table.grow(0)
    assert table.pages_missing(17) == 2 and table.grow(17) and table.capacity_tokens == 32
    pages = list(table.pages)
    assert table.grow(5) and table.pages == pages
    assert not table.grow(16 * 5) and table.pages == pages and pool.free_pages == 2
    assert table.grow(16 * 4) and table.pages[:2] == pages


def test_slots_follow_the_pages():
    pool = PagePool(8, 4)
    table = grown(pool, 4)
    pool.allocate(3)
    assert table.grow(12) and table.pages == [0, 4, 5]
    by_hand = [table.pages[p // 4] * 4 + p % 4 for p in range(12)]
    for start in range(13):
        for stop in range(start, 13):
            slots = table.slots(start, stop)
            assert slots.dtype == np.int64 and slots.tolist() == by_hand[start:stop]
    with pytest.raises(AssertionError):
        table.slots(0, 13)


def test_a_fork_copies_each_written_page_once():
    contents = Contents(8, 4)
    pool = PagePool(8, 4, contents)
    table = grown(pool, 12)
    contents.values.reshape(-1)[table.slots(0, 12)] = range(12)
    fork = table.fork()
    assert pool.free_pages == 5
    for position in (9, 10, 11):
        slot = fork.writable_slot(position)
        assert slot is not None
        contents.values.reshape(-1)[slot] = -position
    assert contents.copies == 1 and fork.pages[:2] == table.pages[:2]
    read = contents.values.reshape(-1)
    assert read[table.slots(0, 12)].tolist() == list(range(12))
    assert read[fork.slots(0, 12)].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, -9, -10, -11]
    assert table.ensure_writable(8, 12) and contents.copies == 1, "the sole owner copied"
    pool.check([table.pages, fork.pages])


def test_ensure_writable_is_all_or_nothing():
    contents = Contents(4, 4)
    pool = PagePool(4, 4, contents)
    table = grown(pool, 12)
    fork = table.fork()
    before = list(fork.pages)
    assert not fork.ensure_writable(0, 12) and fork.pages == before and contents.copies == 0
    assert fork.writable_slot(4) is not None and fork.writable_slot(0) is None
    assert fork.ensure_writable(3, 3)


def test_truncate_keeps_partly_used_pages():
    pool = PagePool(8, 4)
    table = grown(pool, 12)
    assert table.truncate(5) == 1 and table.capacity_tokens == 8
    assert table.truncate(5) == 0 and table.truncate(0) == 2 and pool.free_pages == 8


def test_release_is_idempotent():
    pool = PagePool(8, 4)
    table = grown(pool, 12)
    table.release()
    table.release()
    assert pool.free_pages == 8 and table.capacity_tokens == 0
    pool.check([])


@pytest.mark.parametrize("pages", [[0, 0], [1], [9]])
def test_check_notices(pages):
    pool = PagePool(8, 4)
    assert pool.allocate(1) == [0]
    with pytest.raises(AssertionError):
        PageTable(pool, pages).check()
