"""Recount of a prefix tree from scratch, for `PrefixTree.check`.

Derives every counter the tree keeps incrementally a second time, from its structure and the
pool's owner counts, and compares. Called when idle and in tests; O(tree), never on a hot path.
"""

from typing import TYPE_CHECKING

from serve.kv.node import Node

if TYPE_CHECKING:
    from serve.kv.prefix import PrefixTree


def check_tree(tree: "PrefixTree") -> None:
    """AssertionError naming the first thing found wrong."""
    nodes = [node for root in tree._roots.values() for node in _check_shape(tree, root)]
    assert {root: key for key, root in tree._roots.items()} == tree._key_of, "roots disagree"
    places = {
        page: (node, node.start + index) for node in nodes for index, page in enumerate(node.pages)
    }
    assert len(places) == sum(len(node.pages) for node in nodes), "a page is in the tree twice"
    assert places.keys() == tree._node_of.keys() == tree._place_of.keys(), "page map is stale"
    for page, (node, place) in places.items():
        assert tree._node_of[page] is node, f"page {page} is mapped to the wrong node"
        assert tree._place_of[page] == place, f"page {page} is mapped to the wrong place"
        assert tree.pool.refcount(page) >= 1, f"page {page} is in the tree but free"
    assert tree._evictable == _recount_evictable(tree, nodes), "evictable pages miscounted"
    assert 0 <= tree.hits_tokens <= tree.queries_tokens, "more tokens hit than asked for"
    _check_heap(tree, nodes)


def _check_shape(tree: "PrefixTree", root: Node) -> list[Node]:
    """All nodes under a root, parents before children, links and recency verified."""
    assert root.parent is None and not root.pages and root.start == 0, "a root is malformed"
    assert root.children, "a root without children is kept"
    order = [root]
    for node in order:
        assert len(node.data) == len(node.pages) * tree._page_bytes, "tokens and pages disagree"
        assert node.last_used <= tree._clock, "a node was used in the future"
        for key, child in node.children.items():
            assert child.parent is node and child.pages, "a child is detached or empty"
            assert key == child.first_page(tree._page_bytes), "a child is under the wrong key"
            assert child.start == node.stop, "a child does not start where its parent stops"
            assert child.last_used <= node.last_used, "a child was used later than its parent"
            order.append(child)
    return order


def _recount_evictable(tree: "PrefixTree", nodes: list[Node]) -> int:
    """Evictable pages from owner counts alone; verifies every node's pins on the way."""
    blocked: dict[int, bool] = {}
    total = 0
    for node in reversed(nodes):  # children before parents
        pins = [i for i, page in enumerate(node.pages) if tree.pool.refcount(page) > 1]
        below = sum(blocked[id(child)] for child in node.children.values())
        assert node.pinned_children == below, "pinned children miscounted"
        last = pins[-1] if pins else -1
        assert node.last_pin == node.start + last, "the last pinned page is wrong"
        blocked[id(node)] = bool(pins) or below > 0
        total += 0 if below else len(node.pages) - 1 - last
    return total


def _check_heap(tree: "PrefixTree", nodes: list[Node]) -> None:
    queued = {id(node): stamp for stamp, _, node in tree._heap}
    assert len(queued) == len(tree._heap), "a node is queued twice for eviction"
    for node in nodes:
        assert node.queued == (id(node) in queued), "a node's queue mark is wrong"
        assert not node.candidate or node.queued, "a leaf that could be evicted is not queued"
        assert not node.queued or queued[id(node)] <= node.last_used, "queued with a late stamp"
