"""A slow, plain model of pages and prefixes that the real ones are held to (`tests/kv/drill.py`).

Two dictionaries: owners of each page, and (key, prefix) -> page with a recency stamp, page by
page without any tree. Every page also "contains" values chained from its key and all tokens
before, in a side array, so that a page shared where it must not be shows as content.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from serve.kv.prefix import CacheKey


class Contents:
    """A storage whose pages are rows of an array: what a KV tensor is, without the tensor."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.values = np.zeros((pages, page_tokens), np.int64)
        self.generation = np.zeros(pages, np.int64)
        self.copies = 0

    def copy_page(self, source: int, target: int) -> None:
        self.values[target] = self.values[source]
        self.copies += 1


@dataclass
class Entry:
    """One cached page of the model."""

    page: int
    stamp: int


def chain(key: CacheKey, tokens: list[int]) -> list[int]:
    """A value per position that depends on the key and on every token up to it, as K/V does."""
    value, values = hash(key), []
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


class PlainCache:
    """The prefix cache as a flat dictionary of prefixes, with eviction by looking at them all."""

    def __init__(self, page_tokens: int, owners: Counter[int]) -> None:
        self.size = page_tokens
        self.owners = owners
        self.entries: dict[tuple[CacheKey, tuple[int, ...]], Entry] = {}
        self.clock = 0

    def prefixes(
        self, key: CacheKey, tokens: list[int], limit: int
    ) -> Iterator[tuple[CacheKey, tuple[int, ...]]]:
        for stop in range(self.size, limit + 1, self.size):
            yield key, tuple(tokens[:stop])

    def find(self, key: CacheKey, tokens: list[int], limit: int) -> list[Entry]:
        found = []
        for prefix in self.prefixes(key, tokens, limit):
            entry = self.entries.get(prefix)
            if entry is None:
                break
            found.append(entry)
        return found

    def touch(self, entries: list[Entry]) -> None:
        self.clock += 1
        for entry in entries:
            entry.stamp = self.clock

    def insert(self, key: CacheKey, tokens: list[int], pages: list[int]) -> int:
        path, added = [], 0
        for index, prefix in enumerate(self.prefixes(key, tokens, len(tokens))):
            if prefix not in self.entries:
                self.entries[prefix] = Entry(pages[index], 0)
                self.owners[pages[index]] += 1
                added += 1
            path.append(self.entries[prefix])
        self.touch(path)
        return added

    def blocked(self) -> set[tuple[CacheKey, tuple[int, ...]]]:
        """Prefixes that cannot go: somebody uses them or a longer one."""
        return {
            above
            for (key, prefix), entry in self.entries.items()
            if self.owners[entry.page] > 1
            for above in self.prefixes(key, list(prefix), len(prefix))
        }

    def evictable(self) -> int:
        return len(self.entries) - len(self.blocked())

    def evict(self, wanted: int) -> set[int]:
        freed: set[int] = set()
        while len(freed) < wanted:
            inner = {(key, prefix[: -self.size]) for key, prefix in self.entries}
            leaves = [
                (entry.stamp, name)
                for name, entry in self.entries.items()
                if name not in inner and self.owners[entry.page] == 1
            ]
            if not leaves:
                break
            page = self.entries.pop(min(leaves, key=lambda leaf: leaf[0])[1]).page
            del self.owners[page]
            freed.add(page)
        return freed
