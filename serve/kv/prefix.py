"""The prefix cache: a compressed radix tree of whole pages, one root per cache key.

Owns one reference to each page in it. Promises that a match returns pages whose content was
computed from exactly those tokens under exactly that key, that keys never see each other's
pages, and that eviction frees least recently used leaves that nobody else owns. The engine
calls `match` before a prefill, `insert` after one, `make_room` when pages run short. No torch.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from numpy.typing import NDArray

from serve.kv.audit import check_tree
from serve.kv.node import TOKEN_BYTES, Node, pack_tokens
from serve.kv.pool import PagePool

Tokens = Sequence[int] | NDArray[Any]


class CacheKey(NamedTuple):
    """Requests share pages only when all three are equal.

    `salt` isolates tenants and is set by the server, never taken from a client; `adapter` names
    the weights added to the model; `effort` is a digest of everything that makes K/V inexact.
    """

    salt: str
    adapter: str
    effort: str


class Match(NamedTuple):
    """The cached head of a prompt: `tokens == len(pages) * page_tokens`, both 0 for a miss."""

    pages: list[int]
    tokens: int


class PrefixTree:
    """Prefixes in whole pages, over one pool; a pool carries at most one tree.

    `queries_tokens` and `hits_tokens` count what `match` was asked for and what it found.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.queries_tokens = 0
        self.hits_tokens = 0
        self._page_bytes = pool.page_tokens * TOKEN_BYTES
        self._roots: dict[CacheKey, Node] = {}
        self._key_of: dict[Node, CacheKey] = {}  # of roots
        self._node_of: dict[int, Node] = {}  # page -> node
        self._place_of: dict[int, int] = {}  # page -> place from the root, counted in pages
        self._evictable = 0
        self._clock = 0  # one tick per match or insert: recency without wall time
        self._heap: list[tuple[int, int, Node]] = []
        self._heap_entries = 0
        pool.watch(self)

    @property
    def evictable_pages(self) -> int:
        """Pages `evict` could free now, kept up to date: O(1)."""
        return self._evictable

    @property
    def held_pages(self) -> int:
        """Pages the tree owns, whether or not somebody else does too."""
        return len(self._node_of)

    def pages(self) -> Iterator[int]:
        """Every page the tree owns, for `PagePool.check`."""
        return iter(self._node_of)

    def peek(self, key: CacheKey, tokens: Tokens, *, limit_tokens: int | None = None) -> int:
        """Tokens `match` would find, without retaining, counting or refreshing anything."""
        data = self._pack(tokens, limit_tokens)
        root = self._roots.get(key)
        return 0 if root is None else self._descend(root, data)[2] * self.pool.page_tokens

    def match(
        self,
        key: CacheKey,
        tokens: Tokens,
        *,
        limit_tokens: int | None = None,
        count: bool = True,
    ) -> Match:
        """The longest cached prefix of `tokens` under `key`, its pages retained for the caller.

        The caller releases them, usually by making them the head of a PageTable. At most
        `limit_tokens` tokens, rounded down to whole pages; by default len(tokens) - 1, so that
        at least one token is left to compute logits from. Matched nodes become the most
        recently used. `count` is False for a trial whose caller will match again, so that the
        counters see a request once. O(tokens).
        """
        data = self._pack(tokens, limit_tokens)
        self.queries_tokens += len(tokens) * count
        root = self._roots.get(key)
        if root is None or not data:
            return Match([], 0)
        node = self._walk(root, data)
        pages = self._path_pages(node)
        self.pool.retain(pages)
        found = Match(pages, len(pages) * self.pool.page_tokens)
        self.hits_tokens += found.tokens * count
        return found

    def insert(self, key: CacheKey, tokens: Tokens, pages: Sequence[int]) -> int:
        """Offers the computed pages of `tokens`; returns how many the tree newly owns.

        `pages[i]` holds page i of `tokens`, which needs at least len(tokens) // page_tokens of
        them; a last page that is only partly filled is ignored. Where the tree already has a
        prefix it keeps its own pages, so the new ones are always the last n whole pages. The
        caller's references stay the caller's: nothing in `pages` is released here. Whole pages
        must not be written afterwards except through `PagePool.writable`. O(tokens).
        """
        data = self._pack(tokens, len(tokens))
        count = len(data) // self._page_bytes
        assert count <= len(pages), f"{count} whole pages of tokens but {len(pages)} pages"
        if count == 0:
            return 0
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = Node(None, b"", [], 0, self._clock)
            self._key_of[root] = key
        node = self._walk(root, data)
        fresh = list(pages[node.stop : count])
        if fresh:
            self._add_leaf(node, data[node.stop * self._page_bytes :], fresh)
        return len(fresh)

    def evict(self, pages: int) -> int:
        """Frees up to `pages` pages, least recently used leaves first; returns how many.

        Only pages that the tree alone owns; fewer than asked means `evictable_pages` was less.
        A leaf longer than needed loses its tail only.
        """
        freed = 0
        while freed < pages and self._heap:
            stamp, _, node = heappop(self._heap)
            node.queued = False
            if not node.candidate:
                continue
            if stamp == node.last_used:
                freed += self._trim(node, min(pages - freed, node.evictable))
            self._queue(node)
        return freed

    def make_room(self, pages: int) -> bool:
        """Evicts until the pool has `pages` free pages; False, evicting nothing, if it can't."""
        missing = pages - self.pool.free_pages
        if missing > self._evictable:
            return False
        return missing <= 0 or self.evict(missing) == missing

    def check(self) -> None:
        """AssertionError where the tree is inconsistent in itself or with its pool; O(tree)."""
        check_tree(self)

    def pages_shared(self, pages: list[int]) -> None:
        """From the pool: these pages have a second owner now."""
        for page in reversed(pages):  # deepest first: the ones above then change nothing
            node = self._node_of.get(page)
            if node is not None and self._place_of[page] > node.last_pin:
                self._set_last_pin(node, self._place_of[page])

    def pages_sole(self, pages: list[int]) -> None:
        """From the pool: these pages have one owner left."""
        for page in pages:
            node = self._node_of.get(page)
            if node is not None and self._place_of[page] == node.last_pin:
                self._set_last_pin(node, self._find_last_pin(node, node.last_pin))
                self._queue(node)

    def _pack(self, tokens: Tokens, limit_tokens: int | None) -> bytes:
        limit = len(tokens) - 1 if limit_tokens is None else min(limit_tokens, len(tokens))
        return pack_tokens(tokens, max(limit, 0) // self.pool.page_tokens * self.pool.page_tokens)

    def _descend(self, node: Node, data: bytes) -> tuple[Node, int, int]:
        """Deepest node reached, its matching pages, and the place after the last match."""
        size, common = self._page_bytes, 0
        while common == len(node.pages):
            at = node.stop * size
            child = node.children.get(data[at : at + size]) if at < len(data) else None
            if child is None:
                break
            node, common = child, child.common_pages(data, at, size)
        return node, common, node.start + common

    def _walk(self, root: Node, data: bytes) -> Node:
        """The node at whose end the cached prefix of `data` ends, split there if need be.

        Everything from the root to it is marked as used now.
        """
        node, common, _ = self._descend(root, data)
        if common < len(node.pages):
            node = self._split(node, common)
        self._clock += 1
        step: Node | None = node
        while step is not None:
            step.last_used = self._clock
            step = step.parent
        return node

    def _split(self, node: Node, keep: int) -> Node:
        upper = node.split(keep, self._page_bytes)
        for page in upper.pages:
            self._node_of[page] = upper
        upper.last_pin = self._find_last_pin(upper, upper.stop - 1)
        return upper

    def _path_pages(self, node: Node) -> list[int]:
        runs = []
        step: Node | None = node
        while step is not None:
            runs.append(step.pages)
            step = step.parent
        return [page for run in reversed(runs) for page in run]

    def _add_leaf(self, parent: Node, data: bytes, pages: list[int]) -> None:
        """Takes a reference to each page; all are pinned, as the caller still owns them."""
        leaf = Node(parent, data, pages, parent.stop, self._clock)
        for page in pages:
            assert page not in self._node_of, f"page {page} is in the tree under other tokens"
        self.pool.retain(pages)
        parent.children[leaf.first_page(self._page_bytes)] = leaf
        for place, page in enumerate(pages, leaf.start):
            self._node_of[page] = leaf
            self._place_of[page] = place
        self._evictable += leaf.evictable
        self._set_last_pin(leaf, leaf.stop - 1)

    def _find_last_pin(self, node: Node, place: int) -> int:
        """Place of the last pinned page at or before `place`, node.start - 1 when there is none."""
        while place >= node.start and self.pool.refcount(node.pages[place - node.start]) == 1:
            place -= 1
        return place

    def _set_last_pin(self, node: Node, place: int) -> None:
        blocked, before = node.blocked, node.evictable
        node.last_pin = place
        self._evictable += node.evictable - before
        parent = node.parent
        while parent is not None and node.blocked != blocked:
            change = 1 if node.blocked else -1
            blocked, before = parent.blocked, parent.evictable
            parent.pinned_children += change
            self._evictable += parent.evictable - before
            node, parent = parent, parent.parent

    def _queue(self, node: Node) -> None:
        """Puts a node that can lose its last page into the eviction heap, once."""
        if node.candidate and not node.queued:
            node.queued = True
            self._heap_entries += 1
            heappush(self._heap, (node.last_used, self._heap_entries, node))

    def _trim(self, node: Node, pages: int) -> int:
        """Frees the last `pages` pages of a leaf and forgets the leaf when none is left."""
        key = node.first_page(self._page_bytes)
        dropped = node.trim(pages, self._page_bytes)
        self._evictable -= pages
        for page in dropped:
            del self._node_of[page], self._place_of[page]
        parent = node.parent
        if not node.pages and parent is not None:
            del parent.children[key]
            node.parent = None
            self._queue(parent)
            if parent.parent is None and not parent.children:
                del self._roots[self._key_of.pop(parent)]
        return self.pool.release(dropped)
