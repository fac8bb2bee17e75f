"""One node of the prefix tree: a run of whole pages and what is known about them.

Owns no page itself (the tree does); keeps the arithmetic of splitting, trimming and counting
what can be evicted in one place. Called by `serve.kv.prefix` and `serve.kv.audit` alone.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKEN_BYTES = 8  # tokens are kept as int64, so that comparing pages is one memory compare


def pack_tokens(tokens: Sequence[int] | NDArray[Any], count: int) -> bytes:
    """The first `count` tokens as int64 bytes; OverflowError for an id beyond 64 bits."""
    if isinstance(tokens, np.ndarray):
        return np.ascontiguousarray(tokens[:count], dtype=np.int64).tobytes()
    return array("q", tokens[:count]).tobytes()


class Node:
    """Pages `start .. start + len(pages) - 1` (counted from the root) of every path through it.

    `data` holds their tokens packed, `children` is keyed by a child's first page of packed
    tokens. A page is *pinned* while someone besides the tree owns it; `last_pin` is the place
    (from the root) of this node's last pinned page, `start - 1` when none is. `pinned_children`
    counts children with a pinned page in them or below. A root has no pages and no parent.
    """

    __slots__ = ("parent", "data", "pages", "start", "children", "last_used",
                 "last_pin", "pinned_children", "queued")  # fmt: skip

    def __init__(
        self, parent: "Node | None", data: bytes, pages: list[int], start: int, last_used: int
    ) -> None:
        self.parent = parent
        self.data = data
        self.pages = pages
        self.start = start
        self.children: dict[bytes, Node] = {}
        self.last_used = last_used
        self.last_pin = start - 1
        self.pinned_children = 0
        self.queued = False  # has an entry in the tree's eviction heap

    @property
    def stop(self) -> int:
        """Place after the last page."""
        return self.start + len(self.pages)

    @property
    def blocked(self) -> bool:
        """A page here or below is pinned, so what lies above cannot be evicted."""
        return self.last_pin >= self.start or self.pinned_children > 0

    @property
    def evictable(self) -> int:
        """Pages of this node that leaf-first eviction can free now or once its children went."""
        return 0 if self.pinned_children else self.stop - 1 - self.last_pin

    @property
    def candidate(self) -> bool:
        """Its last page can be evicted at this moment."""
        return not self.children and self.parent is not None and self.last_pin < self.stop - 1

    def first_page(self, page_bytes: int) -> bytes:
        """The key under which the parent holds this node."""
        return self.data[:page_bytes]

    def common_pages(self, data: bytes, offset: int, page_bytes: int) -> int:
        """Leading pages of this node that equal `data` from byte `offset` on."""
        if data.startswith(self.data, offset):
            return len(self.pages)
        size = min(len(self.data), len(data) - offset)
        mine = np.frombuffer(self.data, np.int64, size // TOKEN_BYTES)
        theirs = np.frombuffer(data, np.int64, size // TOKEN_BYTES, offset)
        differs = mine != theirs
        equal = int(differs.argmax()) if differs.any() else len(differs)
        return equal * TOKEN_BYTES // page_bytes

    def split(self, keep: int, page_bytes: int) -> "Node":
        """Moves the first `keep` pages into a new node between this one and its parent.

        Returns the new node. Its `last_pin` is the caller's to set (it needs owner counts);
        everything else about both is consistent, and the parent notices nothing.
        """
        assert self.parent is not None and 0 < keep < len(self.pages), "not a place to split"
        cut = keep * page_bytes
        upper = Node(self.parent, self.data[:cut], self.pages[:keep], self.start, self.last_used)
        self.parent.children[upper.first_page(page_bytes)] = upper
        self.parent = upper
        self.data, self.pages, self.start = self.data[cut:], self.pages[keep:], upper.stop
        upper.children[self.first_page(page_bytes)] = self
        self.last_pin = max(self.last_pin, self.start - 1)
        upper.pinned_children = int(self.blocked)
        return upper

    def trim(self, pages: int, page_bytes: int) -> list[int]:
        """Cuts the last `pages` pages off and returns them."""
        keep = len(self.pages) - pages
        dropped = self.pages[keep:]
        del self.pages[keep:]
        self.data = self.data[: keep * page_bytes]
        return dropped
