"""Buckets that are sent while the backward pass goes on: on a slow link, and what is summed."""

import statistics
import time
from functools import partial
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
from train.communication.transport import dense_bytes
from train.world import LocalWorld, World

STEPS = 4


class Case(NamedTuple):
    """Seconds of a step's passes, and of its sending alone."""

    forward_s: float
    backward_s: float
    send_s: float


CASES = {
    "the link is idle half the time": Case(0.3, 0.6, 0.45),
    "as long as the backward pass": Case(0.3, 0.6, 0.6),
    "the link is what limits": Case(0.05, 0.15, 1.0),
}


class Side:
    """An exchange over a model of its own, on a link of the case's speed."""

    def __init__(self, world: World, case: Case, overlap: bool) -> None:
        self.model = Slow(case.forward_s, case.backward_s)
        self.weights = flat(self.model)
        self.exchange = Exchange(overlapping(overlap), self.weights)
        sent_bytes = dense_bytes(self.weights.summed.nbytes, world.size)
        self.exchange.transport = partial(Throttled, bytes_per_s=sent_bytes / case.send_s)

    def step(self, world: World, number: int) -> tuple[float, float]:
        """Seconds until all is computed, and until all is sent, too."""
        self.weights.clear_gradient()
        world.barrier()
        began_s = time.monotonic()
        self.exchange.begin(world, number)
        self.exchange.follow()
        self.model(torch.ones(2, WIDTH)).sum().backward()
        computed_s = time.monotonic() - began_s
        self.exchange.sum()
        return computed_s, time.monotonic() - began_s


def measured(world: World, case: Case) -> dict[str, float]:
    """Medians of interleaved steps: with overlap, and one after the other, where it is seen what
    computing and sending take alone."""
    early, serial = (Side(world, case, overlap) for overlap in (True, False))
    steps = []
    for number in range(1, STEPS + 1):
        _, overlapped_s = early.step(world, number)
        computed_s, whole_s = serial.step(world, number)
        steps.append((overlapped_s, whole_s, computed_s, whole_s - computed_s))
    names = ("overlapped", "serial", "compute", "send")
    columns = zip(*steps[1:], strict=True)  # the first step opens threads and connections
    return dict(zip(names, map(statistics.median, columns), strict=True))


def every_case(world: World) -> dict[str, dict[str, float]]:
    return {name: measured(world, case) for name, case in CASES.items()}


@pytest.mark.slow  # it needs processes that wake when they should: a starved machine fails it
def test_a_step_takes_what_the_longer_of_the_two_takes():
    """At most 1.15 max(compute, send); one after the other, the mutation, takes more."""
    for rank in on_ranks(2, every_case):
        for name, found in rank.items():
            limit = 1.15 * max(found["compute"], found["send"])
            assert found["overlapped"] <= limit < found["serial"], (name, found)
            case = CASES[name]
            assert found["serial"] >= case.forward_s + case.backward_s + case.send_s


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
    """PowerSGD in buckets learns what it does in one piece: each matrix has factors of its own."""
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
