"""The prefix tree: what matches, who owns what, what is evicted, tenants apart."""

import numpy as np
import pytest

from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, Match, PrefixTree

KEY = CacheKey("tenant", "", "")


def tree_of(pages: int = 64, page_tokens: int = 4) -> tuple[PagePool, PrefixTree]:
    pool = PagePool(pages, page_tokens)
    return pool, PrefixTree(pool)


def put(tree: PrefixTree, tokens: list[int], key: CacheKey = KEY) -> list[int]:
    """Inserts freshly allocated pages and gives up the caller's own references."""
    pages = tree.pool.allocate(-(-len(tokens) // tree.pool.page_tokens)) or []
    tree.insert(key, tokens, pages)
    tree.pool.release(pages)
    return pages


def test_a_match_is_whole_pages_and_leaves_a_token_to_compute():
    pool, tree = tree_of()
    pages = put(tree, list(range(8)))
    assert tree.match(KEY, range(8)) == Match(pages[:1], 4)
    assert tree.match(KEY, range(9)) == Match(pages, 8)
    assert tree.match(KEY, range(8), limit_tokens=8) == Match(pages, 8)
    assert tree.match(KEY, range(9), limit_tokens=7) == Match(pages[:1], 4)
    assert tree.match(KEY, [0, 1, 2, 3, 9, 9, 9, 9, 9]) == Match(pages[:1], 4)
    for miss in ([], [0], [9] * 9, [0, 1, 2, 9, 4]):
        assert tree.match(KEY, miss) == Match([], 0)
    assert pool.refcount(pages[0]) == 6 and pool.refcount(pages[1]) == 3
    tree.check()


def test_tokens_may_be_tuples_lists_ranges_or_arrays():
    _, tree = tree_of()
    put(tree, list(range(8)))
    for tokens in (tuple(range(9)), range(9), np.arange(9), np.arange(9, dtype=np.int32)):
        assert tree.match(KEY, tokens).tokens == 8
    put(tree, [2**62 + i for i in range(4)])
    assert tree.match(KEY, [2**62 + i for i in range(5)]).tokens == 4
    with pytest.raises(OverflowError):
        tree.match(KEY, [2**64] * 9)


def test_duplicates_stay_the_callers():
    pool, tree = tree_of()
    mine = put(tree, [1] * 8)
    theirs = pool.allocate(4) or []
    assert tree.insert(KEY, [1] * 8 + [2] * 7, theirs) == 1, "one new whole page, one partial"
    pool.check([theirs, mine, theirs[2:3]])
    assert tree.insert(KEY, [1] * 8 + [2] * 7, theirs) == 0
    pool.release(theirs)
    assert tree.held_pages == 3 and pool.free_pages == 61
    assert tree.match(KEY, [1] * 8 + [2] * 5).pages == [*mine, theirs[2]]
    tree.check()


def test_a_long_node_splits_where_prompts_part():
    pool, tree = tree_of()
    first = put(tree, [0] * 16)
    second = put(tree, [0] * 8 + [1] * 8)
    assert tree.match(KEY, [0] * 8 + [1] * 9).pages == first[:2] + second[2:]
    assert tree.match(KEY, [0] * 17).pages == first
    assert tree.held_pages == 6 and pool.free_pages == 58
    tree.check()


def test_no_key_sees_anothers_pages():
    pool, tree = tree_of()
    tokens = [5] * 16
    keys = [
        CacheKey(salt, adapter, effort)
        for salt in ("", "a", "b") for adapter in ("", "a") for effort in ("", "a")
    ]  # fmt: skip
    owned = {key: put(tree, tokens, key) for key in keys[:-1]}
    assert tree.match(keys[-1], tokens) == Match([], 0)
    seen: set[int] = set()
    for key, pages in owned.items():
        assert tree.match(key, tokens, limit_tokens=16).pages == pages
        assert not seen & set(pages)
        seen |= set(pages)
    tree.check()


def test_the_least_recently_used_leaf_goes_first():
    pool, tree = tree_of()
    old, new = put(tree, [1] * 8), put(tree, [2] * 8)
    pool.release(tree.match(KEY, [1] * 9).pages)
    assert tree.evict(3) == 3
    assert tree.match(KEY, [2] * 9) == Match([], 0)
    assert tree.match(KEY, [1] * 9).pages == old[:1], "its tail went, its head stayed"
    assert pool.generation[new].tolist() == [1, 1]


def test_pages_in_use_and_what_lies_above_them_stay():
    pool, tree = tree_of()
    put(tree, [1] * 16)
    assert tree.evictable_pages == 4
    pages = tree.match(KEY, [1] * 9).pages
    assert tree.evictable_pages == 2
    pool.release(pages[:1])
    assert tree.evictable_pages == 2, "a page under a used one cannot go before it"
    tree.check()
    assert tree.evict(99) == 2 and tree.evictable_pages == 0 and tree.evict(99) == 0
    pool.release(pages[1:])
    assert tree.evictable_pages == 2 and tree.evict(99) == 2
    tree.check()
    pool.check([])


def test_make_room_is_all_or_nothing():
    pool, tree = tree_of(pages=4)
    put(tree, [1] * 8)
    held = pool.allocate(1) or []
    assert not tree.make_room(4) and tree.held_pages == 2
    assert tree.make_room(1) and tree.held_pages == 2
    assert tree.make_room(2) and tree.held_pages == 1 and pool.free_pages == 2
    assert tree.make_room(3) and tree.held_pages == 0 and pool.free_pages == 3
    pool.check([held])


def test_zero_cases():
    pool, tree = tree_of()
    assert tree.insert(KEY, [], []) == tree.insert(KEY, [1, 2, 3], [0]) == 0
    assert tree.evict(0) == tree.evict(5) == tree.evictable_pages == tree.held_pages == 0
    assert tree.peek(KEY, [1] * 9) == 0 and list(tree.pages()) == []
    tree.check()
    pool.check([])


def test_counters_count_tokens():
    _, tree = tree_of()
    put(tree, [1] * 8)
    tree.match(KEY, [1] * 10)
    tree.match(CacheKey("other", "", ""), [1] * 10)
    tree.peek(KEY, [1] * 10)
    assert tree.match(KEY, [1] * 10, count=False).tokens == 8
    assert (tree.queries_tokens, tree.hits_tokens) == (20, 8)


def test_long_common_prefixes_of_many_nodes():
    """A path of more nodes than Python may recurse."""
    depth = 2_000
    pool, tree = tree_of(pages=depth, page_tokens=1)
    tokens, pages = list(range(depth)), pool.allocate(depth) or []
    for stop in range(1, depth + 1):
        tree.insert(KEY, tokens[:stop], pages)
    assert len({id(node) for node in tree._node_of.values()}) == depth
    assert tree.match(KEY, tokens, limit_tokens=depth).pages == pages
    pool.release(pages)
    pool.release(pages)
    assert tree.evictable_pages == depth
    tree.check()
    assert tree.evict(depth) == depth == pool.free_pages


def test_forgotten_tenants_leave_nothing():
    _, tree = tree_of()
    for tenant in range(200):
        put(tree, [1] * 16, CacheKey(str(tenant), "", ""))
        tree.evict(4)
    assert not tree._roots and not tree._heap and not tree._node_of


def test_a_page_cannot_stand_for_two_prefixes():
    pool, tree = tree_of()
    pages = pool.allocate(1) or []
    tree.insert(KEY, [1] * 4, pages)
    with pytest.raises(AssertionError, match="under other tokens"):
        tree.insert(KEY, [2] * 4, pages)


def leaf_of(tree: PrefixTree):
    return tree._node_of[max(tree._node_of, key=lambda page: tree._place_of[page])]


def miscount(tree: PrefixTree) -> None:
    tree._evictable += 1


def lose_a_pin(tree: PrefixTree) -> None:
    leaf_of(tree).parent.pinned_children += 1


def move_a_pin(tree: PrefixTree) -> None:
    leaf_of(tree).last_pin += 1


def use_later_than_the_parent(tree: PrefixTree) -> None:
    leaf_of(tree).last_used = tree._clock
    leaf_of(tree).parent.last_used = tree._clock - 1


def use_in_the_future(tree: PrefixTree) -> None:
    leaf_of(tree).last_used += 100


def forget_in_the_queue(tree: PrefixTree) -> None:
    tree._heap.clear()


def queue_twice(tree: PrefixTree) -> None:
    tree._heap.append(tree._heap[0])


def drop_a_token(tree: PrefixTree) -> None:
    leaf_of(tree).data = leaf_of(tree).data[:-8]


def change_a_token(tree: PrefixTree) -> None:
    leaf_of(tree).data = b"\7" + leaf_of(tree).data[1:]


def swap_pages(tree: PrefixTree) -> None:
    leaf_of(tree).pages.reverse()


def map_elsewhere(tree: PrefixTree) -> None:
    tree._node_of[leaf_of(tree).pages[0]] = leaf_of(tree).parent


def free_a_page(tree: PrefixTree) -> None:
    tree.pool.release(leaf_of(tree).pages[:1])


def hit_more_than_asked(tree: PrefixTree) -> None:
    tree.hits_tokens = tree.queries_tokens + 1


def detach(tree: PrefixTree) -> None:
    leaf_of(tree).parent = None


DAMAGES = [
    miscount, lose_a_pin, move_a_pin, use_later_than_the_parent, use_in_the_future,
    forget_in_the_queue, queue_twice, drop_a_token, change_a_token, swap_pages, map_elsewhere,
    free_a_page, hit_more_than_asked, detach,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_notices(damage):
    pool, tree = tree_of()
    put(tree, [0] * 16)
    put(tree, [0] * 8 + [1] * 16)
    pool.release(tree.match(KEY, [0] * 17).pages)
    tree.check()
    damage(tree)
    with pytest.raises(AssertionError):
        tree.check()
