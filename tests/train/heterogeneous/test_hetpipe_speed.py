"""Steps a second where one of four workers has half of the others' processor time, by a quota of
the kernel's, against workers that sum their gradients together: both under the same quotas, in
turns.

Quotas are small, so that four workers together leave the machine time to spare and nobody is slow
but by quota. Both really train: forward, backward and update, 28 samples of 96 tokens a step.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.train import tiny
from tests.train.heterogeneous import hetpipe_ranks as ranks
from tests.train.processes import on_ranks
from tests.train.quota import Quotas, join, skipped_without
from train.job import Job
from train.world import GlooWorld

FULL, HALF = 0.25, 0.125
"""Of a processor."""
BOUND, RANKS, ROUNDS = 6, 4, 3
TURN_STEPS = 6
"""After so many, on average over workers, the next one is slow."""
STEPS = RANKS * TURN_STEPS
SAMPLES, TOKENS = 28, 96
"""Of a step and a sample. At speeds 2, 2, 2 and 1 shares by speed are 8, 8, 8 and 4, equal ones
7, and a step takes the slow worker 14 units of time, or 8: 1.75 x, and more by what waiting for
each sum costs those that are together."""


class Found(NamedTuple):
    """ratio: bulk-synchronous seconds over HetPipe's, medians of rounds; stale: most steps that a
    worker was ahead; used: processor time by what quotas gave, bulk-synchronous and HetPipe."""

    ratio: float
    stale: int
    used: tuple[float, float]


def wanted(staleness: int | None, shares: str) -> Job:
    return tiny.job(
        model={"layers": 2, "hidden": 64, "feed_forward": 160},
        data={"sequence_tokens": TOKENS},
        run={
            "tokens": TOKENS * SAMPLES * STEPS * ROUNDS,
            "batch_tokens": TOKENS * SAMPLES,
            "micro_batch_tokens": TOKENS * 2,
            "deterministic": not staleness,
        },
        optimizer={"learning_rate": 0.001, "clip_norm": 0.0},
        workers={"staleness": staleness, "shares": shares},
    )


def both(
    world: GlooWorld, group: str, counted: str, shares: str, bound: int
) -> dict[str, list[tuple[float, float]] | int]:
    """A worker: wall and processor seconds of each round's steps, by form. counted: a file of how
    many steps each worker has made."""
    join(group, world.rank)
    counts = np.memmap(counted, np.int64, "r+", shape=(RANKS,))
    apart = ranks.entered(world, wanted(bound, shares))
    job = wanted(None, "equal")
    forms = {"apart": apart, "together": tiny.trainer(job, ranks.text())}
    took: dict[str, Any] = {form: [] for form in forms}
    for _ in range(ROUNDS):
        for form, learner in forms.items():
            world.barrier()
            begun_s, before_s = time.monotonic(), time.process_time()
            for _ in range(STEPS):
                learner.step(world)
                counts[world.rank] += 1
            if form == "apart":
                apart.settle()
            world.barrier()
            took[form].append((time.monotonic() - begun_s, time.process_time() - before_s))
    return {**took, "stale": max(read.staleness for read in apart.member.shard.reads)}


@contextmanager
def in_turns(quotas: Quotas, counts: Any) -> Iterator[None]:
    """Each worker slow in its turn, by what all have made of their steps."""
    ended = Event()

    def follow() -> None:
        slow = RANKS - 1
        while not ended.wait(0.01):
            now = int(counts.sum()) // (RANKS * TURN_STEPS) % RANKS
            if now != slow:
                quotas.give(slow, FULL)
                quotas.give(now, HALF)
                slow = now

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            ended.set()
        following.result()


def found(throttle: str, shares: str, bound: int = BOUND) -> Found:
    """throttle: "in turns", or the last one "stays" slow. NoQuota as `Quotas` has it."""
    with tempfile.TemporaryDirectory() as folder, Quotas((FULL,) * 3 + (HALF,)) as quotas:
        file = Path(folder) / "counts"
        counts = np.memmap(file, np.int64, "w+", shape=(RANKS,))
        told = (quotas.group, str(file), shares, bound)
        if throttle == "in turns":
            with in_turns(quotas, counts):
                answers = on_ranks(RANKS, both, *told)
        else:
            answers = on_ranks(RANKS, both, *told)
    given = 3 * FULL + HALF
    took, used = {}, {}
    for form in ("together", "apart"):
        rounds = [[answer[form][n] for answer in answers] for n in range(ROUNDS)]
        walls = [max(wall for wall, _ in each) for each in rounds]
        busy = [sum(own for _, own in each) for each in rounds]
        took[form] = statistics.median(walls)
        used[form] = sum(busy) / (given * sum(walls))
        print(f"{form}: rounds of {STEPS} steps {', '.join(f'{wall:.1f}' for wall in walls)} s")
    made = Found(
        took["together"] / took["apart"],
        max(answer["stale"] for answer in answers),
        (used["together"], used["apart"]),
    )
    print(
        f"{throttle}, {shares} shares, bound {bound}: {made.ratio:.2f} x the steps of all "
        f"together; {made.stale} steps ahead; of quotas used {used['together']:.0%} and "
        f"{used['apart']:.0%}"
    )
    return made


def times_faster(throttle: str, shares: str, bound: int = BOUND) -> float:
    """`found`, or the test is skipped."""
    with skipped_without():
        made = found(throttle, shares, bound)
    assert made.stale <= bound
    return made.ratio


@pytest.mark.slow
def test_each_slow_in_its_turn() -> None:
    """A bound of 0 has none of what one of 6 has."""
    assert times_faster("in turns", "equal") >= 1.5
    assert times_faster("in turns", "equal", 0) < 1.25


@pytest.mark.slow
def test_one_that_stays_slow_with_waves_by_speed() -> None:
    """With equal waves everybody ends up waiting at the bound for the slow one."""
    assert times_faster("stays", "measured", 4) >= 1.5
    assert times_faster("stays", "equal", 4) < 1.2
