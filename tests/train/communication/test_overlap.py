"""Buckets that are sent while the backward pass goes on: on a throttled link, and what is summed."""

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.train import tiny
from tests.train.communication.learning import job, losses
from tests.train.communication.links import LAYERS, WIDTH, Slow, Throttled, flat, overlapping
from tests.train.processes import on_ranks
from train.communication.exchange import Exchange
from train.communication.overlap import Overlap, spans_of
from train.world import LocalWorld, World

STEPS = 4


class Case(NamedTuple):
    """Seconds of a step's passes, and of its sending alone."""

    forward_s: float
    backward_s: float
    send_s: float


CASES = {
    "the link is idle half the time": Case(0.2, 0.4, 0.3),
    "as long as the backward pass": Case(0.2, 0.4, 0.4),
    "the link is what limits": Case(0.05, 0.1, 0.6),
}


def step_s(world: World, case: Case, overlap: bool) -> dict[str, float]:
    """Medians over steps: the whole step, and what computing and sending took of it."""
    model = Slow(case.forward_s, case.backward_s)
    weights = flat(model)
    exchange = Exchange(overlapping(overlap), weights)
    rate = weights.summed.nbytes * 2 * (world.size - 1) / world.size / case.send_s
    links: list[Throttled] = []

    def opened(inner: World) -> Throttled:
        links.append(Throttled(inner, rate))
        return links[-1]

    exchange.transport = opened
    taken, computing = [], []
    for step in range(1, STEPS + 1):
        weights.clear_gradient()
        world.barrier()
        began_s = time.monotonic()
        exchange.begin(world, step)
        exchange.follow()
        model(torch.ones(2, WIDTH)).sum().backward()
        computing.append(time.monotonic() - began_s)
        exchange.sum()
        taken.append(time.monotonic() - began_s)
    return {
        "step": statistics.median(taken[1:]),
        "compute": statistics.median(computing[1:]),
        "send": statistics.median(link.sending_s for link in links[1:]),
    }


def every_case(world: World) -> dict[str, Any]:
    return {
        name: {overlap: step_s(world, case, overlap) for overlap in (True, False)}
        for name, case in CASES.items()
    }


def test_a_step_takes_what_the_longer_of_the_two_takes():
    """At most 1.15 max(compute, send); one after the other, which is the mutation, at least 0.85 of
    their sum. Computing is what it takes without a link, as the serial steps show it."""
    for rank in on_ranks(2, every_case):
        for name, found in rank.items():
            compute, send = found[False]["compute"], found[True]["send"]
            assert found[True]["step"] <= 1.15 * max(compute, send), (name, found)
            assert found[False]["step"] >= 0.85 * (compute + send), (name, found)
            assert found[False]["step"] > 1.15 * max(compute, send), (name, found)


def sums(world: World, tables: dict[str, Any]) -> dict[bool, Any]:
    """The gradient's sum with and without overlap; rank 1 has nothing to compute."""
    found = {}
    for overlap in (False, True):
        model = Slow(0, 0)
        weights = flat(model)
        exchange = Exchange(overlapping(overlap, **tables), weights)
        exchange.begin(world, 1)
        if world.rank != 1:
            exchange.follow()
            model(torch.ones(2, WIDTH) / (world.rank + 1)).sum().backward()
        exchange.sum()
        found[overlap] = weights.gradient.numpy()
    return found


def test_the_sum_is_the_same():
    """Also where a rank of three makes no backward pass at all."""
    tables = {"optimizer": {"clip_norm": 0.5}}
    ranks = on_ranks(3, sums, tables)
    for found in ranks:
        np.testing.assert_allclose(found[True], found[False], rtol=1e-4, atol=1e-6)
        assert (found[True] == ranks[0][True]).all()
        assert float(np.linalg.norm(found[True])) == pytest.approx(0.5, rel=1e-3)


def test_buckets_leave_in_the_order_of_a_backward_pass():
    """Every element once; the embedding's bucket is the last, the vectors' the one before."""
    training = tiny.trainer(tiny.job(), [0] * 100)
    spans = spans_of(training.flat, 4096)
    assert sorted(spans)[0][0] == 0 and len(spans) > 3
    assert sum(stop - start for start, stop in spans) == training.flat.gradient.numel()
    assert spans[-1][0] == 0 and spans[-2] == (training.flat.decayed, training.flat.masters.numel())
    assert spans[0][1] == training.flat.decayed


def test_a_failure_while_sending_is_raised():
    """Once, and the next step begins anew."""
    model = Slow(0, 0)
    calls: list[int] = []

    def send(number: int) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise RuntimeError("the link is gone")

    overlap = Overlap([[layer.weight] for layer in model.layers], send)  # type: ignore[list-item]
    overlap.begin()
    with pytest.raises(RuntimeError, match="the link is gone"):
        overlap.finish()
    assert calls == [0, 1, 2]
    overlap.begin()
    overlap.finish()
    assert calls[3:] == list(range(LAYERS))


def test_a_compressed_run_overlaps(tmp_path: Path):
    """PowerSGD in buckets learns what it learns in one piece: each matrix has factors of its own."""
    tiny.corpus(tmp_path)
    compression = {"kind": "powersgd", "rank": 4, "warmup_steps": 2}
    whole = losses(tmp_path, job(10, compression=compression))
    parts = losses(
        tmp_path,
        job(10, compression=compression, communication={"overlap": True, "bucket_bytes": 8192}),
    )
    assert parts["losses"][:2] == pytest.approx(whole["losses"][:2], rel=1e-5)
    assert parts["losses"] == pytest.approx(whole["losses"], rel=0.05)
    assert parts["sent"] == whole["sent"] < 0.2 * whole["dense"]


def test_alone_there_is_nothing_to_wait_for():
    found = sums(LocalWorld(), {})
    assert (found[True] == found[False]).all()
