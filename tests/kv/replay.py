"""Traces replayed through the real pool, tables and tree, in virtual time.

`tests/kv/test_replay.py` and `tests/prove/kv.py` share these; the trace files lie beside the
repository, in ../shared/data, and are never copied into it.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, PrefixTree
from serve.kv.table import PageTable

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
AZURE_CODE = DATA / "azure-llm" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = DATA / "mooncake" / "synthetic_trace.jsonl"


class Arrival(NamedTuple):
    """One request of a length trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Waste(NamedTuple):
    """Shares of allocated K/V memory that hold no token, and how full the pool was at most."""

    mean: float  # average over time of 1 - live / allocated, while anything is allocated
    overall: float  # 1 - (live token-seconds / allocated token-seconds)
    reserved: float  # mean, had every request reserved room for the trace's longest
    peak_pages: int
    requests: int


class Hits(NamedTuple):
    """Blocks asked for and blocks found."""

    found: int
    asked: int

    @property
    def ratio(self) -> float:
        return self.found / self.asked


def read_azure(path: Path = AZURE_CODE) -> list[Arrival]:
    """TIMESTAMP,ContextTokens,GeneratedTokens; times counted from the first row."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Seven decimals of a second; datetime takes six.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return sorted(
        Arrival((at - times[0]).total_seconds(), int(r["ContextTokens"]), int(r["GeneratedTokens"]))
        for at, r in zip(times, rows, strict=True)
    )


def replay_lengths(
    arrivals: Sequence[Arrival], page_tokens: int = 16, tokens_per_s: float = 20.0
) -> Waste:
    """Plays requests through one pool, all memory taken from real page tables.

    A request takes its prompt's pages in the first step after it arrives, one more token per
    step of 1 / tokens_per_s from then on, and releases everything after its last. Nothing is
    shared: this is the allocator alone.
    """
    longest = max(a.prompt_tokens + a.output_tokens for a in arrivals)
    pool = PagePool(2 * sum(-(-a.prompt_tokens // page_tokens) for a in arrivals), page_tokens)
    live: list[tuple[PageTable, int, int]] = []  # table, tokens in it, tokens in the end
    waiting = list(reversed(arrivals))
    step, shares, reserved, live_sum, allocated_sum, peak = 0, 0.0, 0.0, 0, 0, 0
    counted = 0
    while waiting or live:
        now_s = step / tokens_per_s
        while waiting and waiting[-1].at_s <= now_s:
            a = waiting.pop()
            live.append((PageTable(pool), a.prompt_tokens, a.prompt_tokens + a.output_tokens))
        for table, tokens, _ in live:
            assert table.grow(tokens), "the replay's pool is too small"
        if live:
            tokens_now = sum(tokens for _, tokens, _ in live)
            allocated = pool.used_pages * page_tokens
            shares += 1 - tokens_now / allocated
            reserved += 1 - tokens_now / (longest * len(live))
            live_sum, allocated_sum = live_sum + tokens_now, allocated_sum + allocated
            peak, counted = max(peak, pool.used_pages), counted + 1
        for table, tokens, final in live:
            if tokens == final:
                table.release()
        live = [(table, tokens + 1, final) for table, tokens, final in live if tokens < final]
        step += 1
    pool.check([])
    return Waste(
        shares / counted, 1 - live_sum / allocated_sum, reserved / counted, peak, len(arrivals)
    )


def read_mooncake(path: Path = MOONCAKE) -> list[list[int]]:
    """The hash_ids of each request in order of arrival; one id stands for 512 tokens."""
    with path.open() as file:
        return [json.loads(line)["hash_ids"] for line in file]


def replay_hashes(requests: Iterable[Sequence[int]], capacity: int | None = None) -> Hits:
    """Block hits of requests through a real tree, one block per token and page.

    A request asks for all its blocks (the trace counts the last one too, so the match is not
    held back by a token), then leaves all of them in the cache. `capacity` in blocks, None for
    room for everything; with too little, older prefixes are evicted first and a request longer
    than the capacity leaves its head only.
    """
    requests = list(requests)
    room = max(map(len, requests)) + (
        len({block for request in requests for block in request}) if capacity is None else capacity
    )
    pool = PagePool(room, 1)
    tree = PrefixTree(pool)
    key = CacheKey("", "", "")
    for blocks in requests:
        table = PageTable(pool, tree.match(key, blocks, limit_tokens=len(blocks)).pages)
        assert table.grow(len(blocks))
        tree.insert(key, blocks, table.pages)
        table.release()
        if capacity is not None:
            tree.evict(tree.held_pages - capacity)
    tree.check()
    pool.check([tree.pages()])
    return Hits(tree.hits_tokens, tree.queries_tokens)


def count_hashes(requests: Iterable[Sequence[int]]) -> Hits:
    """The same with infinite capacity from a set of prefixes: what the tree must find."""
    seen: set[tuple[int, int]] = set()
    found = asked = 0
    numbers: dict[tuple[int, int], int] = defaultdict(lambda: len(numbers) + 1)
    for blocks in requests:
        asked += len(blocks)
        prefix, hit = 0, True
        for block in blocks:
            name = (prefix, block)
            hit = hit and name in seen
            found += hit
            seen.add(name)
            prefix = numbers[name]
    return Hits(found, asked)
