"""Pages of KV memory and who owns them.

Owns the owner count of every page, the list of free pages and the generation numbers. Promises
that a page is handed out to nobody while it has an owner, that allocation is all or nothing,
and that a page written through `writable` is seen by its writer alone. Page tables, the prefix
tree and hand-off leases call it; a lease is simply one more owner. No torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class PageStorage(Protocol):
    """What a pool needs of the memory below it (`serve.kv.storage.KVStorage` in production)."""

    @property
    def generation(self) -> NDArray[np.int64]:
        """Generation number of every page, shape [pages]; the pool alone writes it."""

    def copy_page(self, source: int, target: int) -> None:
        """Copies the whole content of page `source` over page `target`."""


class OwnerWatcher(Protocol):
    """Told when pages pass between one owner and several (the prefix tree is one)."""

    def pages_shared(self, pages: list[int]) -> None:
        """These pages had one owner and now have two."""

    def pages_sole(self, pages: list[int]) -> None:
        """These pages had two owners and now have one."""


class PagePool:
    """`pages` pages of `page_tokens` tokens each; every page is free or has owners, never both.

    An owner is whoever got the page from `allocate` or called `retain`; each owner releases
    exactly once. Without a storage the pool only counts, which is what simulations need.
    Every call costs O(pages named in it).
    """

    def __init__(self, pages: int, page_tokens: int, storage: PageStorage | None = None) -> None:
        if pages < 1 or page_tokens < 1:
            raise ValueError(
                f"A page pool needs at least 1 page of at least 1 token; "
                f"got pages={pages}, page_tokens={page_tokens}."
            )
        self.pages = pages
        self.page_tokens = page_tokens
        self.storage = storage
        self.generation: NDArray[np.int64] = (
            np.zeros(pages, np.int64) if storage is None else storage.generation
        )
        assert self.generation.shape == (pages,), "storage and pool disagree on the page count"
        self._owners = [0] * pages
        # A stack: pages used last are used first, so memory never touched stays uncommitted.
        self._free = list(range(pages - 1, -1, -1))
        self._watcher: OwnerWatcher | None = None
        self._generation_sum = int(self.generation.sum())

    @property
    def free_pages(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages with at least one owner."""
        return self.pages - len(self._free)

    def refcount(self, page: int) -> int:
        """Owners of `page`; 0 when it is free."""
        return self._owners[page]

    def watch(self, watcher: OwnerWatcher) -> None:
        """Tells `watcher` of every change between one and two owners; one watcher per pool."""
        assert self._watcher is None, "a page pool has one watcher"
        self._watcher = watcher

    def allocate(self, pages: int) -> list[int] | None:
        """`pages` free pages, now owned once by the caller; None when there are too few.

        All or nothing. Zero pages are the empty list, also on a full pool. The content is
        whatever the last owner left.
        """
        assert pages >= 0, "cannot allocate a negative number of pages"
        if pages > len(self._free):
            return None
        if pages == 0:
            return []
        taken = self._free[: -pages - 1 : -1]
        del self._free[-pages:]
        for page in taken:
            self._owners[page] = 1
        return taken

    def retain(self, pages: Sequence[int]) -> None:
        """Adds one owner per mention of a page. A free page cannot be retained."""
        owners = self._owners
        shared = []
        for page in pages:
            count = owners[page]
            assert count > 0, f"page {page} is free and cannot be retained"
            owners[page] = count + 1
            if count == 1:
                shared.append(page)
        if shared and self._watcher is not None:
            self._watcher.pages_shared(shared)

    def release(self, pages: Sequence[int]) -> int:
        """Removes one owner per mention of a page; returns how many pages became free.

        A freed page's generation goes up by one before it can be handed out again, so that a
        reader in another process can tell that what it read is no longer what it asked for.
        """
        owners = self._owners
        freed, sole = [], []
        for page in pages:
            count = owners[page] - 1
            assert count >= 0, f"page {page} is released more often than it was owned"
            owners[page] = count
            if count == 0:
                freed.append(page)
            elif count == 1:
                sole.append(page)
        if freed:
            self.generation[freed] += 1
            self._generation_sum += len(freed)
            self._free.extend(reversed(freed))
        if sole and self._watcher is not None:
            self._watcher.pages_sole(sole)
        return len(freed)

    def writable(self, page: int) -> int | None:
        """A page with the content of `page` that the calling owner alone may write.

        The same page when the caller is its only owner. Otherwise a fresh copy, owned once by
        the caller, who has thereby given up `page`; None (and nothing changed) when no page is
        free for the copy.
        """
        assert self._owners[page] > 0, f"page {page} is free and cannot be written"
        if self._owners[page] == 1:
            return page
        fresh = self.allocate(1)
        if fresh is None:
            return None
        if self.storage is not None:
            self.storage.copy_page(page, fresh[0])
        self.release([page])
        return fresh[0]

    def check(self, owned: Iterable[Iterable[int]] | None = None) -> None:
        """AssertionError where the books do not balance; O(pages).

        `owned`: the pages of every owner there is (tables, tree, leases). With it, owner counts
        must equal the mentions; without it, only the pool's own books are compared.
        """
        assert len(self._owners) == self.pages, "owner counts of a different number of pages"
        assert all(count >= 0 for count in self._owners), "a page has a negative owner count"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        unowned = {page for page, count in enumerate(self._owners) if count == 0}
        assert free <= unowned, f"pages {sorted(free - unowned)} are both free and owned"
        assert unowned <= free, f"pages {sorted(unowned - free)} are lost: no owner, not free"
        assert int(self.generation.min()) >= 0, "a generation number is negative"
        assert int(self.generation.sum()) == self._generation_sum, (
            "a generation number changed without a page becoming free"
        )
        if owned is None:
            return
        mentions = Counter(page for pages in owned for page in pages)
        for page, count in enumerate(self._owners):
            assert mentions.pop(page, 0) == count, f"page {page} counts {count} owners wrongly"
        assert not mentions, f"pages {sorted(mentions)} are owned but not in the pool"
