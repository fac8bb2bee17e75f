"""Shares and pipelines of training against all there are."""

from dataclasses import dataclass

import numpy as np
import pytest

from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.shares import SharesPlanner, Worker, batch_shares, step_s
from autoscale.placement.shares_pipeline import (
    Device,
    LayerBytes,
    fastest_pipeline,
    fastest_workers,
    global_staleness,
    most_in_flight,
)
from tests.autoscale.placement import pools_oracle, shares_oracle

SEED = int(np.random.SeedSequence().generate_state(1)[0])


@pytest.mark.parametrize("seed", range(SEED, SEED + 40))
def test_batch_shares_are_the_best_of_all(seed: int):
    workers, samples = shares_oracle.random_workers(np.random.default_rng(seed))
    wanted = shares_oracle.least_step_s(workers, samples)
    if wanted == float("inf"):
        with pytest.raises(InfeasibleError, match="memory"):
            batch_shares(workers, samples)
        return
    shares = batch_shares(workers, samples)
    assert sum(shares) == samples
    assert all(n <= w.most_samples for n, w in zip(shares, workers, strict=True))
    assert step_s(workers, shares) == pytest.approx(wanted)


def test_without_limits_shares_are_as_the_speeds():
    workers = [Worker(0.01, 1000), Worker(0.02, 1000), Worker(0.04, 1000)]
    assert batch_shares(workers, 700) == [400, 200, 100]
    assert batch_shares([Worker(0.01, 300), *workers[1:]], 700) == [300, 267, 133]


@pytest.mark.parametrize("seed", range(SEED, SEED + 40))
def test_the_pipeline_is_the_fastest_of_all(seed: int):
    devices, layers, flights = shares_oracle.random_pipeline(np.random.default_rng(seed))
    wanted = shares_oracle.best_rate(devices, layers, flights)
    if wanted == 0:
        with pytest.raises(InfeasibleError):
            fastest_pipeline(devices, layers, most_in_flight=flights)
        return
    found = fastest_pipeline(devices, layers, most_in_flight=flights)
    assert found.minibatches_per_s == pytest.approx(wanted)
    assert [stage.start for stage in found.stages[1:]] == [s.stop for s in found.stages[:-1]]
    assert (found.stages[0].start, found.stages[-1].stop) == (0, len(layers.state_bytes))


@pytest.mark.parametrize("seed", range(SEED, SEED + 15))
def test_virtual_workers_are_the_best_of_all_splits(seed: int):
    random = np.random.default_rng(seed)
    devices, layers, flights = shares_oracle.random_pipeline(random, 4, 4)
    wanted = shares_oracle.best_workers_rate(devices, layers, flights)
    if wanted == 0:
        with pytest.raises(InfeasibleError):
            fastest_workers(devices, layers, most_in_flight=flights)
        return
    found = fastest_workers(devices, layers, most_in_flight=flights)
    assert found.minibatches_per_s == pytest.approx(wanted)


def test_memory_changes_the_cut():
    """Equal layers on a fast and a slow device: 3 and 1, unless the fast one holds only two."""
    layers = LayerBytes((1.0,) * 4, (0.0,) * 4, (0.0,) * 4)
    slow = Device("slow", (3.0,) * 4, 9.0)
    for memory, sizes in ((9.0, [3, 1]), (2.0, [2, 2])):
        found = fastest_pipeline(
            [Device("fast", (1.0,) * 4, memory), slow], layers, most_in_flight=2
        )
        assert sorted((s.stop - s.start for s in found.stages), reverse=True) == sizes


def test_minibatches_in_flight_keep_activations_on_early_stages():
    """Two in flight: the first stage keeps two minibatches' activations, the last one."""
    layers = LayerBytes((1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
    devices = [Device("large", (1.0, 1.0), 3.0), Device("small", (1.0, 1.0), 2.0)]
    found = fastest_pipeline(devices, layers, most_in_flight=2)
    assert [stage.device for stage in found.stages] == ["large", "small"]
    assert found.minibatches_per_s == pytest.approx(1.0)


def test_staleness_as_hetpipe_counts_it():
    """s_local = 3: D = 0 gives 6, D = 4 gives 22."""
    assert global_staleness(4, 0) == 6
    assert global_staleness(4, 4) == 22
    assert most_in_flight(0, 6) == 4 and most_in_flight(0, 5) == 3
    assert most_in_flight(4, 22) == 4
    with pytest.raises(ValueError, match="staleness_bound = 3: clock_distance = 4 alone gives 4"):
        most_in_flight(4, 3)


BUCKET = Bucket(1024, 0)


@dataclass
class Rates:
    """Samples per second by kind."""

    by_kind: dict[str, float]
    source: str = "made up"

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return self.by_kind[shape.kind]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return 0


def training(random: np.random.Generator) -> Problem:
    kinds = [f"k{n}" for n in range(int(random.integers(1, 4)))]
    offers = tuple(
        Offer(
            f"o{k}",
            k,
            1,
            "r",
            "z",
            "spot",
            float(random.integers(1, 9)),
            int(random.integers(1, 4)),
        )
        for k in kinds
    )
    rates = Rates({k: float(random.uniform(1, 20)) for k in kinds})
    shapes = [ReplicaShape(k, role="training") for k in kinds]
    demand = Demand({BUCKET: float(random.uniform(2, 40))})
    return Problem(demand, pools_oracle.Shop(offers), rates, shapes)


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_what_is_bought_is_the_cheapest_that_keeps_the_rate(seed: int):
    """Over all numbers of machines, a step of 16 whole samples as long as it is at best."""
    problem, batch = training(np.random.default_rng(seed)), 16
    wanted = cheapest(problem, batch)
    if wanted == float("inf"):
        with pytest.raises(InfeasibleError, match="quota"):
            SharesPlanner(batch).plan(problem)
        return
    plan = SharesPlanner(batch).plan(problem)
    assert plan.usd_per_h == pytest.approx(wanted)
    assert sum(plan.routing[BUCKET].values()) == pytest.approx(1.0)
    assert all(abs(s * batch - round(s * batch)) < 1e-9 for s in plan.routing[BUCKET].values())


def cheapest(problem: Problem, batch: int) -> float:
    offers, least = problem.catalog.offers(), float("inf")
    rates = [problem.profile.requests_per_s(s, BUCKET, Slo()) for s in problem.shapes]
    for counts in np.ndindex(*((o.quota or 0) + 1 for o in offers)):
        usd = sum(n * o.usd_per_h for n, o in zip(counts, offers, strict=True))
        speeds = [r for n, r in zip(counts, rates, strict=True) for _ in range(n)]
        if usd < least and speeds:
            # The shortest step is one of the times k / speed.
            steps = sorted({k / s for s in speeds for k in range(1, batch + 1)})
            step = next(t for t in steps if sum(int(t * s + 1e-9) for s in speeds) >= batch)
            if batch / step >= problem.demand.total_per_s * (1 - 1e-9):
                least = usd
    return least


def test_several_buckets_are_refused():
    problem = training(np.random.default_rng(1))
    two = Problem(
        Demand({BUCKET: 1.0, Bucket(2048, 0): 1.0}),
        problem.catalog,
        problem.profile,
        problem.shapes,
    )
    with pytest.raises(ValueError, match="training takes one bucket, not 2"):
        SharesPlanner().plan(two)
