"""Gemini (SOSP 23): every worker's state after every step also lies in m - 1 peers' memory.

Pure planning: who keeps whose copies, which losses of machines that survives, and which version is
whole among what the survivors hold. train/elastic/peers.py moves the bytes.

Placement: workers form groups of m that hold each other's shares. Where m does not divide their
number n, the last n - m * (n // m - 1) workers form a ring instead, each keeping the shares of the
m - 1 before it ("mixed" placement). State is lost when some share's m holders are all lost.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb

from train.elastic.messages import Held, Version


def holders(workers: int, copies: int) -> tuple[tuple[int, ...], ...]:
    """By share (its owner's rank): the ranks that keep it, the owner first.

    copies: m, the owner's included. ValueError if there are fewer workers than copies.
    """
    if not 1 <= copies <= workers:
        raise ValueError(
            f"copies = {copies} of every share need as many workers, but there are {workers}; "
            f"1 to {workers} are accepted"
        )
    grouped = workers if workers % copies == 0 else copies * (workers // copies - 1)
    found = []
    for rank in range(grouped):
        first = rank - rank % copies
        found.append((rank, *(first + (rank - first + d) % copies for d in range(1, copies))))
    ring = workers - grouped
    for place in range(ring):
        found.append(tuple(grouped + (place + d) % ring for d in range(copies)))
    return tuple(found)


def survives(placement: Sequence[Sequence[int]], lost: Iterable[int]) -> bool:
    """Whether every share has a holder that is not lost."""
    gone = set(lost)
    return all(any(rank not in gone for rank in kept) for kept in placement)


def fatal_sets(workers: int, copies: int, losses: int) -> int:
    """How many of the C(n, k) sets of k lost workers lose state, in closed form.

    Groups: sets that contain one of n/m whole groups, by inclusion and exclusion over groups.
    Ring of r: sets with m of its members in a row; those without are the necklaces cut open,
    counted by `_without_run`. A set survives if it survives in every group and in the ring.
    """
    if not 0 <= losses <= workers:
        raise ValueError(f"{losses} of {workers} workers cannot be lost; 0 to {workers} can")
    whole = workers % copies == 0
    groups = workers // copies if whole else workers // copies - 1
    ring = 0 if whole else workers - groups * copies
    safe: int = sum(
        _groups_safe(groups, copies, losses - in_ring) * _without_run(ring, copies, in_ring)
        for in_ring in range(min(ring, losses) + 1)
    )
    return comb(workers, losses) - safe


def _groups_safe(groups: int, copies: int, losses: int) -> int:
    """Sets of `losses` among groups of m that hold no whole group."""
    members = groups * copies
    ways: int = sum(
        (-1) ** hit * comb(groups, hit) * comb(members - hit * copies, losses - hit * copies)
        for hit in range(min(groups, losses // copies) + 1)
        if losses - hit * copies <= members - hit * copies
    )
    return ways


def _without_run(ring: int, run: int, chosen: int) -> int:
    """Sets of `chosen` on a ring of `ring` without `run` in a row.

    The ring's unchosen members cut it into as many gaps, each of fewer than `run` chosen ones.
    Counted as ring/unchosen times the ways to fill the gaps (each set is counted once for each
    unchosen member that may come first, out of `ring` turns), the ways by inclusion and exclusion.
    """
    unchosen = ring - chosen
    if unchosen == 0:
        return 0 if ring else 1
    ways: int = sum(
        (-1) ** full * comb(unchosen, full) * comb(chosen - full * run + unchosen - 1, unchosen - 1)
        for full in range(min(unchosen, chosen // run) + 1)
    )
    return ring * ways // unchosen


def fatal_by_enumeration(workers: int, copies: int, losses: int) -> int:
    """The same by trying every set: for small numbers, and for whoever doubts the formula."""
    placement = holders(workers, copies)
    return sum(not survives(placement, lost) for lost in combinations(range(workers), losses))


def newest_whole(held: Sequence[Sequence[Held]]) -> tuple[Version | None, tuple[str, ...]]:
    """The newest version of which the workers together hold every share, and, where there is none,
    which shares of the newest version nobody has (one sentence each).

    held: by worker.
    """
    found: dict[Version, set[int]] = {}
    for worker in held:
        for share in worker:
            found.setdefault(share.version, set()).add(share.index)
    newest = sorted(found, key=lambda version: (version.step, -version.shards), reverse=True)
    for version in newest:
        if len(found[version]) == version.shards:
            return version, ()
    if not newest:
        return None, ("no worker holds any state",)
    latest = newest[0]
    missing = sorted(set(range(latest.shards)) - found[latest])
    return None, tuple(
        f"share {index} of {latest.shards} after step {latest.step}: nobody who is left holds it"
        for index in missing
    )
