"""Who runs in the next step: continuous batching under a cost budget, decodes first.

Every running sequence with one token to compute gets it; what is left of the budget goes to prompts
by rank, in chunks, those of waiting sequences too while seats and pages last. At most `max_running`
sequences are in a step: adopted ones beyond that wait for a seat. Short of pages, the prefix tree
gives up what only it owns, then the running sequence of the lowest rank is preempted: its pages go
and it is computed again later (recompute-preemption). Called once a step by Engine.

Rank is priority, then the turn that the tenant has, then arrival. A sequence of a better priority
takes seat and pages from running ones of a worse one. Waiting improves a sequence's priority by one
every AGEING_STEPS steps, so nobody waits for ever behind a stream of better ones.
"""

from dataclasses import dataclass

from serve.engine.cost import StepCost
from serve.engine.sequence import Sequence
from serve.engine.siblings import Siblings
from serve.kv.pool import PagePool
from serve.kv.prefix import PrefixTree
from serve.kv.table import PageTable


@dataclass(frozen=True)
class Slice:
    """Tokens [start, stop) of one sequence to compute in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the slice reaches the sequence's end, so that a new token follows."""
        return self.stop == len(self.sequence)

    @property
    def rows(self) -> int:
        """Of how many of its last tokens the logits are wanted."""
        if self.sequence.request.score is not None:
            return self.stop - self.start
        return int(self.samples)


AGEING_STEPS = 128  # some seconds on a busy machine: a level is a head start, not a wall


class Scheduler:
    """Owns the waiting and running queues; pages belong to pool, tree and page tables.

    `prefix_cache` False: nothing is matched or inserted.
    """

    def __init__(
        self,
        pool: PagePool,
        tree: PrefixTree,
        *,
        budget_tokens: int,
        max_running: int,
        cost: StepCost,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.tree = tree
        self.budget_tokens = budget_tokens
        self.max_running = max_running
        self.cost = cost
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.siblings = Siblings()
        self.preemptions = 0
        self._short_of_pages = False  # the best waiting sequence found no room in the last step

    def schedule(self) -> list[Slice]:
        """The slices of the next step; empty when there is nothing to do."""
        seated = sorted(self.running, key=self._rank)[: self.max_running]
        decoding = [s for s in seated if s.uncomputed_tokens == 1]
        prefilling = [s for s in seated if s.uncomputed_tokens > 1]
        slices: list[Slice] = []
        self._short_of_pages = False
        for sequence in decoding:
            self._take(sequence, sequence.computed_tokens + 1, slices)
        budget = self.budget_tokens - sum(self.cost.of(s.start, s.stop) for s in slices)
        self._fill(prefilling, budget, slices)
        for sequence in self.waiting:
            sequence.waited_steps += 1
        return slices

    def _fill(self, prefilling: list[Sequence], budget: float, slices: list[Slice]) -> None:
        """Spend the budget on prompts, running and waiting ones, the best rank first."""
        blocked = False
        while budget >= 1:
            waiting = None if blocked else self._next_waiting()
            running = prefilling[0] if prefilling else None
            if waiting is None and running is None:
                return
            if running is None or (waiting and self._rank(waiting) < self._rank(running)):
                assert waiting is not None
                admitted = self._admit(waiting, slices)
                taken = self._take_chunk(waiting, budget, slices) if admitted else 0.0
                blocked = taken == 0.0  # the others rank below it, and must not take its room
                budget -= taken
                continue
            budget -= self._take_chunk(prefilling.pop(0), budget, slices)

    def _next_waiting(self) -> Sequence | None:
        startable = (s for s in self.waiting if not self.siblings.must_wait(s))
        return min(startable, key=self._rank, default=None)

    def _rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """Lower goes first."""
        return self._level(sequence), sequence.request.turn, sequence.arrival

    def _level(self, sequence: Sequence) -> int:
        return sequence.request.priority - sequence.waited_steps // AGEING_STEPS

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it stands; its pages are the caller's to release."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def reserve(self, sequence: Sequence) -> bool:
        """Give a sequence cached pages and room for all its tokens, without running it.

        False, and nothing taken, when pages are short: a reservation never preempts, takes no page
        that an admitted prompt will ask for, and does not overtake a sequence that waits for pages.
        """
        if (self._short_of_pages and self.waiting) or not self._fits(sequence):
            return False
        self._match(sequence)
        table = sequence.table
        assert table is not None
        grown = self._grow(table, sequence.computed_tokens, len(sequence))
        assert grown, "pages that fit were not to be had"
        return True

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence's pages; it holds nothing computed afterwards."""
        if sequence.table is not None:
            sequence.table.release()
        sequence.table = None
        sequence.computed_tokens = 0
        sequence.exact = True  # what comes next is computed here

    def remember(self, sequence: Sequence) -> None:
        """Offer the sequence's full, computed pages to the prefix tree, if they are exact."""
        table = sequence.table
        if not self.prefix_cache or table is None or not sequence.exact:
            return
        full = sequence.computed_tokens // self.pool.page_tokens
        if full:
            tokens = sequence.tokens(0, full * self.pool.page_tokens)
            self.tree.insert(sequence.request.cache_key, tokens, table.pages[:full])

    def check(self) -> None:
        """Invariants of the queues: nobody twice, every running sequence has its pages."""
        everyone = [id(s) for s in (*self.running, *self.waiting)]
        assert len(everyone) == len(set(everyone)), "a sequence stands in two queues"
        for sequence in self.running:
            assert sequence.table is not None, sequence.request_id
            assert sequence.table.capacity_tokens >= sequence.computed_tokens
        for sequence in self.waiting:
            assert sequence.table is None and sequence.computed_tokens == 0

    def _take_chunk(self, sequence: Sequence, budget: float, slices: list[Slice]) -> float:
        """Add as much of a prompt as the budget allows; returns the cost of what was added."""
        if sequence not in self.running:  # preempted by an earlier slice of this very step
            return 0.0
        start = sequence.computed_tokens
        affordable = self.cost.affordable(start, budget)
        if not slices:  # one token deep in a long context may cost more than a whole budget
            affordable = max(affordable, 1)
        tokens = min(sequence.uncomputed_tokens, affordable)
        if tokens <= 0 or not self._take(sequence, start + tokens, slices):
            return 0.0
        return self.cost.of(start, start + tokens)

    def _take(self, sequence: Sequence, stop: int, slices: list[Slice]) -> bool:
        """Add [computed, stop) of a running sequence to the step, finding pages for it."""
        if sequence not in self.running:
            return False
        table = sequence.table
        assert table is not None
        while not self._grow(table, sequence.computed_tokens, stop):
            victim = max(self.running, key=self._rank)
            self._preempt(victim, slices)
            if victim is sequence:
                return False
        slices.append(Slice(sequence, sequence.computed_tokens, stop))
        return True

    def _admit(self, sequence: Sequence, slices: list[Slice]) -> bool:
        """Move a waiting sequence to running if a seat and pages for all its tokens can be had,
        from running ones of a worse priority if need be."""
        while (seated := len(self.running) < self.max_running) is False or not self._fits(sequence):
            victim = max(self.running, key=self._rank, default=None)
            if victim is None or self._level(victim) <= self._level(sequence):
                self._short_of_pages = seated
                return False
            self._preempt(victim, slices)
        self._match(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Whether free and evictable pages cover a waiting sequence, counting nothing yet."""
        # Pages that admitted prompts will still ask for are spoken for; else long prompts thrash.
        promised = sum(s.table.pages_missing(len(s)) for s in self.running if s.table is not None)
        wanted = promised + -(-len(sequence) // self.pool.page_tokens)
        shared = self.siblings.shared_pages(sequence)
        if shared:
            return wanted - shared <= self.pool.free_pages + self.tree.evictable_pages
        if wanted <= self.pool.free_pages + self.tree.evictable_pages or not self._may_match(
            sequence
        ):
            return wanted <= self.pool.free_pages + self.tree.evictable_pages
        # Cached pages need no room, but those that only the tree owns stop being evictable.
        tokens = sequence.tokens(0, len(sequence))
        found = self.tree.match(sequence.request.cache_key, tokens, count=False)
        fits = wanted - len(found.pages) <= self.pool.free_pages + self.tree.evictable_pages
        self.pool.release(found.pages)
        return fits

    def _match(self, sequence: Sequence) -> None:
        """Start a page table from a sibling's prompt or the longest cached prefix, either of which
        leaves a token to compute."""
        forked = self.siblings.fork(sequence)
        if forked is not None:
            sequence.table, sequence.computed_tokens = forked
            if not sequence.output:
                sequence.cached_tokens = sequence.computed_tokens
            return
        if not self._may_match(sequence):
            sequence.table = PageTable(self.pool)
            return
        match = self.tree.match(sequence.request.cache_key, sequence.tokens(0, len(sequence)))
        sequence.table = PageTable(self.pool, match.pages)
        sequence.computed_tokens = match.tokens
        if not sequence.output:
            sequence.cached_tokens = match.tokens

    def _may_match(self, sequence: Sequence) -> bool:
        """Cached pages hold no logits: a prompt that is to be scored is computed whole."""
        return self.prefix_cache and sequence.request.score is None

    def _grow(self, table: PageTable, start: int, stop: int) -> bool:
        """Slots that this table alone may write for positions [start, stop), evicting from the
        tree if need be; False when short of pages."""
        if not (self.tree.make_room(table.pages_missing(stop)) and table.grow(stop)):
            return False
        # A page that a sibling shares is copied; there is at most one that is not whole.
        return table.ensure_writable(start, stop) or (
            self.tree.make_room(1) and table.ensure_writable(start, stop)
        )

    def _preempt(self, victim: Sequence, slices: list[Slice]) -> None:
        """Take a running sequence back to the queue, where its arrival keeps its place."""
        slices[:] = [s for s in slices if s.sequence is not victim]
        self.running.remove(victim)
        self.remember(victim)  # what is not evicted by then need not be computed again
        self.release(victim)
        self.waiting.append(victim)
        self.preemptions += 1
