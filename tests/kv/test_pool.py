"""The page pool: all or nothing, generations, copy-on-write, and a check that can fail."""

import subprocess
import sys

import numpy as np
import pytest

from serve.kv.pool import PagePool
from tests.kv.model import Contents


def test_allocation_is_all_or_nothing():
    pool = PagePool(3, 16)
    first = pool.allocate(2)
    assert first is not None and len(set(first)) == 2 == pool.used_pages
    assert pool.allocate(2) is None and pool.free_pages == 1
    assert pool.allocate(0) == []
    last = pool.allocate(1)
    assert last is not None and sorted(first + last) == [0, 1, 2]
    assert pool.allocate(0) == [] and pool.allocate(1) is None


def test_a_page_is_free_when_its_last_owner_releases_it():
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.retain(pages)
    assert pool.release(pages) == 0 and pool.free_pages == 1
    assert pool.generation[pages[0]] == 0
    assert pool.release(pages) == 1 and pool.free_pages == 2
    assert pool.generation[pages[0]] == 1


def test_memory_used_before_is_used_again_first():
    pool = PagePool(1000, 16)
    for _ in range(50):
        pages = pool.allocate(3)
        assert pages is not None and max(pages) < 3
        pool.release(pages)


def test_writable_copies_once_and_only_what_is_shared():
    contents = Contents(3, 4)
    pool = PagePool(3, 4, contents)
    (page,) = pool.allocate(1) or []
    contents.values[page] = 7
    assert pool.writable(page) == page and contents.copies == 0
    pool.retain([page])
    copy = pool.writable(page)
    assert copy is not None and copy != page and contents.copies == 1
    assert contents.values[copy].tolist() == [7] * 4
    assert pool.refcount(page) == pool.refcount(copy) == 1
    pool.check([[page], [copy]])


def test_writable_on_a_full_pool_changes_nothing():
    pool = PagePool(1, 4)
    pages = pool.allocate(1) or []
    pool.retain(pages)
    assert pool.writable(pages[0]) is None
    pool.check([pages, pages])


@pytest.mark.parametrize(("pages", "page_tokens"), [(0, 16), (16, 0)])
def test_a_pool_without_room_is_refused(pages, page_tokens):
    with pytest.raises(ValueError, match="at least 1 page"):
        PagePool(pages, page_tokens)


def test_misuse_is_an_assertion():
    pool = PagePool(2, 4)
    with pytest.raises(AssertionError, match="cannot be retained"):
        pool.retain([0])
    with pytest.raises(AssertionError, match="more often than it was owned"):
        PagePool(2, 4).release([0])
    with pytest.raises(AssertionError, match="cannot be written"):
        pool.writable(0)


def lose_a_page(pool: PagePool, page: int) -> None:
    pool._owners[page] = 0


def count_one_more(pool: PagePool, page: int) -> None:
    pool._owners[page] += 1


def free_an_owned_page(pool: PagePool, page: int) -> None:
    pool._free.append(page)


def free_twice(pool: PagePool, page: int) -> None:
    pool._free.append(pool._free[0])


def count_below_zero(pool: PagePool, page: int) -> None:
    pool._owners[pool._free[0]] = -1


def turn_back_a_generation(pool: PagePool, page: int) -> None:
    pool.generation[page] -= 1


def skip_a_generation(pool: PagePool, page: int) -> None:
    pool.generation[page] += 1


BREAKAGES = [
    lose_a_page, count_one_more, free_an_owned_page, free_twice, count_below_zero,
    turn_back_a_generation, skip_a_generation,
]  # fmt: skip


@pytest.mark.parametrize("damage", BREAKAGES)
def test_check_notices(damage):
    pool = PagePool(8, 4)
    pages = pool.allocate(3) or []
    pool.check([pages])
    damage(pool, pages[1])
    with pytest.raises(AssertionError):
        pool.check([pages])


@pytest.mark.parametrize("owned", [[], [[0, 1, 2], [2]], [[0, 1, 2, 3]], [[0, 1, 2, 99]]])
def test_check_compares_with_the_owners_it_is_given(owned):
    pool = PagePool(8, 4)
    assert pool.allocate(3) == [0, 1, 2]
    with pytest.raises(AssertionError):
        pool.check(owned)


def test_generations_live_in_the_storage():
    contents = Contents(4, 4)
    pool = PagePool(4, 4, contents)
    pool.release(pool.allocate(2) or [])
    assert np.array_equal(contents.generation, [1, 1, 0, 0])


def test_the_books_import_no_torch():
    code = (
        "import sys, serve.kv.pool, serve.kv.prefix, serve.kv.table, serve.kv.shared\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
