"""Shares by measured speed: what they are, that the gradient does not see them, and that they make
a step faster where one worker has less of a processor, by a quota of the kernel's."""

import itertools
import os
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch

from tests.train import tiny
from tests.train.processes import on_ranks
from tests.train.quota import Quotas, join, skipped_without
from train.data.stream import SampleStream
from train.heterogeneous.shares import Equal, Measured, shares
from train.step import Trainer
from train.weights import build_model, read_start
from train.world import GlooWorld, LocalWorld


def last(counts: list[int], rates: list[float]) -> float:
    return max(count / rate for count, rate in zip(counts, rates, strict=True))


@pytest.mark.parametrize("rates", [[1.0, 0.4], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [5.0, 0.1, 2.0]])
def test_nobody_could_end_earlier(rates: list[float]) -> None:
    """Against every way there is."""
    for count in (1, 7, 12):
        ways = itertools.product(range(count + 1), repeat=len(rates))
        best = min(last(list(way), rates) for way in ways if sum(way) == count)
        made = shares(count, rates)
        assert sum(made) == count
        assert last(made, rates) == pytest.approx(best)


def test_units_and_memory() -> None:
    assert shares(14, [2.0, 1.0], unit=4) == [10, 4]
    assert shares(12, [9.0, 1.0], caps=[6, 0]) == [6, 6]
    assert shares(12, [9.0, 1.0], unit=4, caps=[5, 8]) == [4, 8]
    with pytest.raises(ValueError, match="12 samples of a step do not fit.*: 9 would"):
        shares(12, [1.0, 1.0], caps=[4, 5])


JOB = tiny.job(
    model={"layers": 2, "hidden": 64, "feed_forward": 160},
    data={"sequence_tokens": 64},
    run={"tokens": 64 * 28 * 24, "batch_tokens": 64 * 28, "micro_batch_tokens": 64},
)


def tokens() -> Any:
    return np.random.default_rng(3).integers(0, 255, 200_000).astype(np.uint16)


def trainer(kind: str) -> Trainer:
    stream = SampleStream(tokens(), JOB.data.sequence_tokens, JOB.run.seed)
    made = Measured(every=2) if kind == "measured" else Equal()
    return Trainer(JOB, build_model(JOB, read_start(JOB)), stream, made)


def trained(world: GlooWorld, kind: str, slow: float) -> dict[str, Any]:
    """Some steps; rank 1's clock says that it is slower than it is."""
    made = trainer(kind)
    now = itertools.count()
    made._clock = lambda: next(now) * (1 / slow if world.rank else 1.0)
    reports = [made.step(world) for _ in range(8)]
    return {
        "losses": [report.loss for report in reports],
        "shares": [len(report.ids) for report in reports],
        "ids": [report.ids for report in reports],
    }


def test_the_curve_does_not_see_the_shares() -> None:
    """Equal to one process's in float64, each sample taken once, and two to five once measured."""
    alone = trainer("equal")
    expected = [alone.step(LocalWorld()) for _ in range(8)]
    fast, slow = on_ranks(2, trained, "measured", 0.4)
    assert fast["losses"] == pytest.approx([report.loss for report in expected], abs=1e-9)
    assert fast["losses"] == slow["losses"]
    for report, mine, theirs in zip(expected, fast["ids"], slow["ids"], strict=True):
        assert mine + theirs == report.ids
    assert fast["shares"][0] == slow["shares"][0] == 14
    assert fast["shares"][-1] > slow["shares"][-1]


def throttled(world: GlooWorld, group: str) -> dict[str, float]:
    """Seconds of a step by kind of shares, medians; rank 1 has 0.4 of rank 0's processor time."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[world.rank]})
    join(group, world.rank)
    made = {kind: trainer(kind) for kind in ("equal", "measured")}
    took: dict[str, list[float]] = {kind: [] for kind in made}
    for turn in range(12):
        for kind, each in made.items():
            begun = time.perf_counter()
            each.step(world)
            if turn >= 4:
                took[kind].append(time.perf_counter() - begun)
    return {kind: statistics.median(times) for kind, times in took.items()}


@pytest.mark.slow
def test_a_slower_processor_costs_less() -> None:
    """One worker with 80 % of a processor, one with 32 %: measured shares make 1.25 x the steps."""
    with skipped_without(), Quotas((0.8, 0.32), period_us=20_000) as quotas:
        answers = on_ranks(2, throttled, quotas.group)
    ratio = max(a["equal"] for a in answers) / max(a["measured"] for a in answers)
    print(f"steps with measured shares over equal ones: {ratio:.2f} x")
    assert ratio >= 1.25


def test_a_new_set_of_workers_is_measured_anew() -> None:
    made = Measured(every=1)
    made.computed(4, 1.0)
    world = LocalWorld()
    assert made.mine(0, 6, world).samples == 6
    made.mine(6, 6, world)
    assert made.mine(12, 6, LocalWorld(generation=1)).samples == 6
    assert torch.is_tensor(world.all_gather(torch.zeros(1))[0])
