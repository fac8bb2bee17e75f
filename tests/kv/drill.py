"""Random operations on a real pool, tree and tables, compared with the plain model at each step."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, PrefixTree
from serve.kv.table import PageTable
from tests.kv.model import Contents, PlainCache, chain

KEYS = (CacheKey("", "", ""), CacheKey("tenant", "", ""), CacheKey("tenant", "lora", ""))


@dataclass
class Run:
    """One simulated sequence: `values[i]` is what slot i must contain."""

    key: CacheKey
    table: PageTable
    tokens: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)


class Drill:
    """One seed's worth of operations under page pressure; any disagreement is an AssertionError."""

    def __init__(
        self,
        seed: int,
        pages: int = 96,
        page_tokens: int = 4,
        pool_type: type[PagePool] = PagePool,
        tree_type: type[PrefixTree] = PrefixTree,
    ) -> None:
        self.random = random.Random(seed)
        self.contents = Contents(pages, page_tokens)
        self.pool = pool_type(pages, page_tokens, self.contents)
        self.tree = tree_type(self.pool)
        self.owners: Counter[int] = Counter()
        self.cache = PlainCache(page_tokens, self.owners)
        self.runs: list[Run] = []
        self.leases: list[list[int]] = []
        self.done: Counter[str] = Counter()
        self.operations: list[tuple[int, Callable[[], None]]] = [
            (20, self.start), (30, self.extend), (8, self.fork), (10, self.rewind),
            (18, self.insert), (18, self.finish), (4, self.evict), (4, self.lease),
            (4, self.end_lease), (3, self.peek), (2, self.allocate),
        ]  # fmt: skip

    def run(self, operations: int, check_every: int = 50) -> Counter[str]:
        """Runs that many operations; returns how often each thing happened."""
        weights = [weight for weight, _ in self.operations]
        for number in range(operations):
            _, operation = self.random.choices(self.operations, weights)[0]
            operation()
            self.done[operation.__name__] += 1
            assert self.pool.free_pages == self.pool.pages - len(self.owners), "free pages"
            assert self.tree.held_pages == len(self.cache.entries), "pages in the tree"
            if number % 5 == 0:
                assert self.tree.evictable_pages == self.cache.evictable(), "evictable pages"
            if number % check_every == 0:
                self.check()
        self.check()
        return self.done

    def check(self) -> None:
        """Everything: the real checks, the model's owner counts, the content of every page."""
        self.tree.check()
        tables = [run.table.pages for run in self.runs]
        self.pool.check([*tables, *self.leases, self.tree.pages()])
        for page in range(self.pool.pages):
            assert self.pool.refcount(page) == self.owners[page] or not self.owners[page]
        self.owners += Counter()  # drops the zero counts that reading has left
        for run in self.runs:
            run.table.check()
            slots = run.table.slots(0, len(run.tokens))
            assert self.contents.values.reshape(-1)[slots].tolist() == run.values, "content"
        for (key, prefix), entry in self.cache.entries.items():
            want = chain(key, list(prefix))[-self.pool.page_tokens :]
            assert self.contents.values[entry.page].tolist() == want, "content of a cached page"

    def close(self) -> None:
        """Gives everything back; nothing may be left owned."""
        for run in self.runs:
            run.table.release()
        for lease in self.leases:
            self.pool.release(lease)
        self.tree.evict(self.pool.pages)
        self.pool.check([])
        self.tree.check()
        assert self.pool.free_pages == self.pool.pages

    # The operations

    def start(self) -> None:
        rng = self.random
        key, tokens = rng.choice(KEYS), []
        if self.runs and rng.random() < 0.6:
            source = rng.choice(self.runs)
            tokens = source.tokens[: rng.randrange(len(source.tokens) + 1)]
            key = source.key if rng.random() < 0.8 else key
        tokens = tokens + self.draw(rng.randrange(1, 24))
        limit = rng.choice([None, None, len(tokens), rng.randrange(len(tokens) + 1)])
        expected = self.cache.find(key, tokens, len(tokens) - 1 if limit is None else limit)
        match = self.tree.match(key, tokens, limit_tokens=limit)
        assert match.pages == [entry.page for entry in expected], "matched pages"
        assert match.tokens == len(match.pages) * self.pool.page_tokens
        assert limit is not None or match.tokens < len(tokens), "the whole prompt was matched"
        self.cache.touch(expected)
        self.owners.update(match.pages)
        self.done["hit_pages"] += len(match.pages)
        values = chain(key, tokens)
        found = self.contents.values[match.pages].reshape(-1).tolist()
        assert found == values[: match.tokens], "matched pages hold other content"
        run = Run(key, PageTable(self.pool, match.pages), tokens[: match.tokens], found)
        self.runs.append(run)
        self.append(run, tokens[match.tokens :])

    def extend(self) -> None:
        if self.runs:
            self.append(self.random.choice(self.runs), self.draw(self.random.randrange(6)))

    def fork(self) -> None:
        if not self.runs:
            return
        run = self.random.choice(self.runs)
        free = self.pool.free_pages
        self.runs.append(Run(run.key, run.table.fork(), run.tokens[:], run.values[:]))
        assert self.pool.free_pages == free, "a fork took a page"
        self.owners.update(run.table.pages)

    def rewind(self) -> None:
        """Goes back to an earlier position and on with other tokens: copy-on-write territory."""
        if not self.runs:
            return
        run = self.random.choice(self.runs)
        keep = self.random.randrange(len(run.tokens) + 1)
        del run.tokens[keep:], run.values[keep:]
        if self.random.random() < 0.5:
            dropped = run.table.pages[-(-keep // self.pool.page_tokens) :]
            assert run.table.truncate(keep) == len(dropped)
            self.disown(dropped)
        self.append(run, self.draw(self.random.randrange(1, 6)))

    def insert(self) -> None:
        if not self.runs:
            return
        run = self.random.choice(self.runs)
        added = self.tree.insert(run.key, run.tokens, run.table.pages)
        assert added == self.cache.insert(run.key, run.tokens, run.table.pages), "newly owned"
        self.done["inserted_pages"] += added

    def finish(self) -> None:
        if self.runs:
            self.drop(self.runs[self.random.randrange(len(self.runs))])

    def evict(self) -> None:
        self.evict_pages(self.random.randrange(8))

    def lease(self) -> None:
        """Somebody else holds arbitrary live pages for a while, as a hand-off does."""
        live = sorted(self.owners)
        pages = self.random.sample(live, min(len(live), self.random.randrange(4)))
        self.pool.retain(pages)
        self.owners.update(pages)
        self.leases.append(pages)

    def end_lease(self) -> None:
        if self.leases:
            pages = self.leases.pop(self.random.randrange(len(self.leases)))
            self.pool.release(pages)
            self.disown(pages)

    def peek(self) -> None:
        key, tokens = self.random.choice(KEYS), self.draw(12)
        counted = self.tree.queries_tokens
        want = len(self.cache.find(key, tokens, 12)) * self.pool.page_tokens
        assert self.tree.peek(key, tokens, limit_tokens=12) == want
        assert self.tree.queries_tokens == counted, "a peek was counted"

    def allocate(self) -> None:
        free = self.pool.free_pages
        pages = self.pool.allocate(self.random.randrange(free + 3))
        if pages is None:
            assert self.pool.free_pages == free, "a refused allocation took pages"
            self.done["refused"] += 1
            return
        assert len(set(pages)) == len(pages) and not any(self.owners[page] for page in pages)
        assert self.pool.release(pages) == len(pages)
        self.owners += Counter()

    # Their parts

    def draw(self, count: int) -> list[int]:
        return self.random.choices((0, 1, 2), (8, 1, 1), k=count)

    def disown(self, pages: list[int]) -> None:
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                del self.owners[page]

    def drop(self, run: Run) -> None:
        self.disown(run.table.pages)
        run.table.release()
        self.runs = [other for other in self.runs if other is not run]

    def evict_pages(self, wanted: int) -> None:
        before = self.contents.generation.copy()
        freed = self.tree.evict(wanted)
        expected = self.cache.evict(wanted)
        assert freed == len(expected), "number of evicted pages"
        assert set(np.flatnonzero(self.contents.generation != before)) == expected, "evicted pages"
        self.done["evicted_pages"] += freed

    def append(self, run: Run, tokens: list[int]) -> None:
        """Writes tokens at the end of a run, evicting and preempting until there is room."""
        while not self.write(run, tokens):
            others = [other for other in self.runs if other is not run]
            self.done["preempted"] += 1
            if not others:
                return self.drop(run)
            self.drop(self.random.choice(others))
        return None

    def write(self, run: Run, tokens: list[int]) -> bool:
        start, stop = len(run.tokens), len(run.tokens) + len(tokens)
        table, size = run.table, self.pool.page_tokens
        old = list(table.pages)
        missing = table.pages_missing(stop)
        if not table.grow(stop):
            if missing - self.pool.free_pages > self.tree.evictable_pages:
                return False
            self.evict_pages(missing - self.pool.free_pages)
            assert table.grow(stop), "room was made but is not there"
        self.owners.update(table.pages[len(old) :])
        assert table.pages[: len(old)] == old and table.capacity_tokens >= stop
        touched = table.pages[start // size : -(-stop // size)] if tokens else []
        shared = [page for page in touched if self.owners[page] > 1]
        if len(shared) > self.pool.free_pages:
            assert not table.ensure_writable(start, stop) and table.pages[: len(old)] == old
            self.evict_pages(len(shared))
            return False
        copies = self.contents.copies
        if len(tokens) == 1:
            slots = np.array([table.writable_slot(start)])
        else:
            assert table.ensure_writable(start, stop)
            slots = table.slots(start, stop)
        assert self.contents.copies - copies == len(shared), "copies made"
        self.done["copied_pages"] += len(shared)
        fresh = table.pages[start // size : -(-stop // size)] if tokens else []
        self.disown(touched)
        self.owners.update(fresh)
        values = chain(run.key, run.tokens + tokens)[start:]
        self.contents.values.reshape(-1)[slots] = values
        run.tokens += tokens
        run.values += values
        return True
