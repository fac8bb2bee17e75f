"""The pages of one sequence, in order.

Owns one reference to each of its pages and gives it back in `release` (or `truncate`). Promises
that a slot it calls writable is written by this sequence alone: shared pages are copied first.
The engine holds one table per sequence; forks share every page until one side writes. No torch.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.kv.pool import PagePool


class PageTable:
    """Token position p lives in page `pages[p // page_tokens]` at offset `p % page_tokens`.

    A slot is `page * page_tokens + offset`: a row of the storage seen as [slots, ...].
    `pages` given to the constructor must already be retained for this table (what
    `PrefixTree.match` returns is); from then on they are the table's to release.
    """

    def __init__(self, pool: PagePool, pages: Sequence[int] = ()) -> None:
        self.pool = pool
        self.pages: list[int] = list(pages)

    @property
    def capacity_tokens(self) -> int:
        """Positions that have a slot; 0 for an empty table."""
        return len(self.pages) * self.pool.page_tokens

    def pages_missing(self, tokens: int) -> int:
        """Pages to allocate until `tokens` positions fit; 0 when they already do."""
        return max(0, -(-tokens // self.pool.page_tokens) - len(self.pages))

    def grow(self, tokens: int) -> bool:
        """Makes room for `tokens` positions in all, never shrinks.

        True at once when they already fit. False, and nothing changed, when the pool has too
        few free pages: the caller evicts or preempts and asks again.
        """
        fresh = self.pool.allocate(self.pages_missing(tokens))
        if fresh is None:
            return False
        self.pages.extend(fresh)
        return True

    def truncate(self, tokens: int) -> int:
        """Releases pages that hold no position below `tokens`; returns the pages given up."""
        keep = -(-tokens // self.pool.page_tokens)
        dropped = self.pages[keep:]
        del self.pages[keep:]
        self.pool.release(dropped)
        return len(dropped)

    def fork(self) -> "PageTable":
        """A second table over the same pages, each now owned once more; costs no page."""
        self.pool.retain(self.pages)
        return PageTable(self.pool, self.pages)

    def release(self) -> None:
        """Gives up every page; the table is then empty. A second call does nothing."""
        pages, self.pages = self.pages, []
        self.pool.release(pages)

    def slots(self, start: int, stop: int) -> NDArray[np.int64]:
        """Slots of positions start..stop-1, shape [stop - start], for reading.

        Empty when start == stop. Before writing them call `ensure_writable` on the same range.
        """
        assert 0 <= start <= stop <= self.capacity_tokens, "positions outside the page table"
        size = self.pool.page_tokens
        if stop == start + 1:  # a token that is decoded: what a full step asks for most
            return np.array([self.pages[start // size] * size + start % size])
        positions = np.arange(start, stop, dtype=np.int64)
        first = start // size
        pages = np.array(self.pages[first : -(-stop // size)], dtype=np.int64)
        return pages[positions // size - first] * size + positions % size

    def ensure_writable(self, start: int, stop: int) -> bool:
        """Makes this table the only owner of the pages of positions start..stop-1.

        Shared ones are replaced by copies. False, and nothing changed, when the pool cannot
        hold all the copies. True for an empty range.
        """
        assert 0 <= start <= stop <= self.capacity_tokens, "positions outside the page table"
        if start == stop:
            return True
        size = self.pool.page_tokens
        places = range(start // size, (stop - 1) // size + 1)
        shared = [place for place in places if self.pool.refcount(self.pages[place]) > 1]
        if len(shared) > self.pool.free_pages:
            return False
        for place in shared:
            page = self.pool.writable(self.pages[place])
            assert page is not None, "free pages vanished between the count and the copy"
            self.pages[place] = page
        return True

    def writable_slot(self, position: int) -> int | None:
        """The slot of one position, safe to write; None when a copy is due and no page is free."""
        if not self.ensure_writable(position, position + 1):
            return None
        size = self.pool.page_tokens
        return self.pages[position // size] * size + position % size

    def check(self) -> None:
        """AssertionError when the table names a page twice or one that is not owned."""
        assert len(set(self.pages)) == len(self.pages), "a table holds a page twice"
        for page in self.pages:
            assert 0 <= page < self.pool.pages, f"page {page} is not in the pool"
            assert self.pool.refcount(page) > 0, f"page {page} is in a table but free"
