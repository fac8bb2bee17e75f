"""Proof rows of KV memory: random operations, allocator waste, prefix hits on real traces.

`python -m tests.prove.kv` prints them, with the hit ratio at finite capacities underneath.
"""

import sys
import time
from pathlib import Path

from tests.kv import replay
from tests.kv.drill import Drill
from tests.prove.row import Row, print_rows

CAPACITIES = (1_000, 10_000, 30_000, 50_000)
OPERATIONS = 100_000


def random_operations() -> Row:
    """1e5 operations on pool, tree and tables, each compared with the plain model."""
    check, target = "random pool/tree/table operations", f"{OPERATIONS:,} agree with the model"
    drill = Drill(seed=2026)
    started = time.perf_counter()
    try:
        done = drill.run(OPERATIONS)
        drill.close()
    except AssertionError as error:
        return Row(check, target, f"after {sum(drill.done.values()):,}: {error}", False)
    took_s = time.perf_counter() - started
    events = ", ".join(f"{done[name]:,} {name.replace('_', ' ')}" for name in (
        "hit_pages", "evicted_pages", "copied_pages", "preempted",
    ))  # fmt: skip
    return Row(check, target, f"{OPERATIONS:,} in {took_s:.0f} s ({events})", True)


def allocator_waste() -> Row:
    """Share of allocated pages that holds no token, over the Azure code trace."""
    check, target = "allocator waste, Azure code lengths, page 16", "< 4 %"
    if not replay.AZURE_CODE.is_file():
        return _no_data(check, target, replay.AZURE_CODE)
    waste = replay.replay_lengths(replay.read_azure())
    measured = (
        f"{waste.mean:.2%} over time, {waste.overall:.2%} of token-seconds, peak "
        f"{waste.peak_pages:,} pages, {waste.requests:,} requests "
        f"(reserving the longest: {waste.reserved:.1%})"
    )
    return Row(check, target, measured, waste.mean < 0.04 and waste.overall < 0.04)


def prefix_hits() -> Row:
    """Block hit ratio of the Mooncake synthetic trace, infinite capacity."""
    check, target = "prefix hits, Mooncake synthetic, infinite", "0.6396 exactly"
    if not replay.MOONCAKE.is_file():
        return _no_data(check, target, replay.MOONCAKE)
    requests = replay.read_mooncake()
    hits = replay.replay_hashes(requests)
    ok = round(hits.ratio, 4) == 0.6396 and hits == replay.count_hashes(requests)
    return Row(check, target, f"{hits.ratio:.6f} ({hits.found:,} of {hits.asked:,} blocks)", ok)


def rows() -> list[Row]:
    """All rows of this module; about 15 s."""
    return [random_operations(), allocator_waste(), prefix_hits()]


def hit_curve() -> list[tuple[int, float]]:
    """For information: (capacity in blocks, hit ratio) of the Mooncake trace with LRU."""
    requests = replay.read_mooncake()
    return [(blocks, replay.replay_hashes(requests, blocks).ratio) for blocks in CAPACITIES]


def _no_data(check: str, target: str, path: Path) -> Row:
    where = "/".join(path.parts[-5:])
    return Row(check, target, f"no data: ../{where} (beside the repository) is missing", False)


def main() -> int:
    """Prints the table and the curve; 1 when a row is missed."""
    complete = print_rows(rows())
    if replay.MOONCAKE.is_file():
        for blocks, ratio in hit_curve():
            print(f"  for information: LRU with {blocks:>6,} blocks hits {ratio:.4f}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
