"""Random operations on pool, tree and tables against a plain model, and broken ones caught."""

from collections.abc import Sequence

import pytest

from serve.kv.pool import PagePool
from serve.kv.prefix import PrefixTree
from tests.kv.drill import Drill


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_agree_with_the_model(seed):
    drill = Drill(seed)
    done = drill.run(20_000)
    for event in ("hit_pages", "inserted_pages", "evicted_pages", "copied_pages", "preempted"):
        assert done[event] > 500, f"{event} hardly happened: the run proves nothing"
    drill.close()


@pytest.mark.parametrize(("pages", "page_tokens"), [(7, 1), (24, 3), (400, 16)])
def test_other_sizes(pages, page_tokens):
    drill = Drill(11, pages, page_tokens)
    drill.run(3_000)
    drill.close()


class NeverCopies(PagePool):
    def writable(self, page: int) -> int | None:
        return page


class ForgetsAnOwner(PagePool):
    def retain(self, pages: Sequence[int]) -> None:
        super().retain(pages[:-1])


class FreesTooLate(PagePool):
    def release(self, pages: Sequence[int]) -> int:
        return super().release(pages[1:])


class KeepsGeneration(PagePool):
    def release(self, pages: Sequence[int]) -> int:
        before = self.generation.copy()
        freed = super().release(pages)
        self.generation[:] = before
        return freed


@pytest.mark.parametrize("pool", [NeverCopies, ForgetsAnOwner, FreesTooLate, KeepsGeneration])
def test_a_broken_pool_is_noticed(pool):
    with pytest.raises(AssertionError):
        Drill(0, pool_type=pool).run(2_000, check_every=1)


class OneRootForAll(PrefixTree):
    def match(self, key, tokens, *, limit_tokens=None, count=True):
        merged = key._replace(salt="", adapter="")
        return super().match(merged, tokens, limit_tokens=limit_tokens, count=count)

    def insert(self, key, tokens, pages):
        return super().insert(key._replace(salt="", adapter=""), tokens, pages)


class EvictsInAnyOrder(PrefixTree):
    def evict(self, pages: int) -> int:
        self._heap.reverse()
        return super().evict(pages)


class IgnoresPins(PrefixTree):
    def pages_shared(self, pages: list[int]) -> None:
        pass


@pytest.mark.parametrize("tree", [OneRootForAll, EvictsInAnyOrder, IgnoresPins])
def test_a_broken_tree_is_noticed(tree):
    with pytest.raises(AssertionError):
        Drill(0, tree_type=tree).run(2_000, check_every=1)
