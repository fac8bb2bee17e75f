"""The planner of spans through the contract: what it buys carries the demand, within SLO and
quota."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from autoscale.catalog.kind import GpuKind
from autoscale.catalog.model import ModelSize
from autoscale.catalog.offer import Offer
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import InfeasibleError, Problem
from autoscale.placement.spans import SpansPlanner, output_tokens_per_s

MODEL = ModelSize("small", 8, 1024, 8, 8, 128, 4096, 1000)
LAYER_BYTES = MODEL.layer_weight_bytes()


@dataclass(frozen=True)
class Shelf:
    """Two kinds: one with room for six layers, one with room for two, slower and cheaper."""

    quota: int = 9
    network_gb_per_s: float = 1.25

    def kind(self, name: str) -> GpuKind:
        memory = {"big": 8 * LAYER_BYTES, "little": 3 * LAYER_BYTES}[name]
        return GpuKind(name, int(memory), 100.0, 1000.0, 10.0)

    def offers(self, *, at_s: float | None = None) -> Sequence[Offer]:
        common = {
            "count": 1, "region": "r", "zone": "z", "market": "on_demand",
            "network_gb_per_s": self.network_gb_per_s,
        }  # fmt: skip
        return [
            Offer("b", "big", usd_per_h=3.0, quota=self.quota, **common),  # type: ignore[arg-type]
            Offer("l", "little", usd_per_h=1.0, quota=self.quota, **common),  # type: ignore[arg-type]
        ]


class Times:
    """Prompts at 10 us a token, decode 2 ms and 50 us a sequence; the little kind takes double."""

    source = "made up"

    def layer_s(self, kind: str, phase: str, tokens: float) -> float:
        slow = {"big": 1.0, "little": 2.0}[kind]
        return slow * (1e-5 * tokens if phase == "prefill" else 2e-3 + 5e-5 * tokens)

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        raise AssertionError("spans are planned by times of layers alone")

    def kv_tokens(self, shape: ReplicaShape) -> int:
        raise AssertionError("spans are planned by times of layers alone")


def problem(per_s: float, slo: Slo | None = None, quota: int = 9) -> Problem:
    demand = Demand({Bucket(100, 50): per_s}, slo or Slo())
    return Problem(demand, Shelf(quota), Times(), [], model=MODEL)


def test_the_flow_is_the_demand_and_passes_every_layer():
    asked = problem(20.0)
    plan = SpansPlanner().plan(asked)
    flow = plan.flow_tokens_per_s
    assert sum(t for (a, _), t in flow.items() if a == "source") == pytest.approx(1000.0)
    assert sum(t for (_, b), t in flow.items() if b == "sink") == pytest.approx(1000.0)
    assert output_tokens_per_s(asked.demand) == 1000.0
    for span in plan.spans:
        entering = sum(t for (_, b), t in flow.items() if b == span.node)
        leaving = sum(t for (a, _), t in flow.items() if a == span.node)
        assert entering == pytest.approx(leaving)
    assert plan.usd_per_h == sum(p.usd_per_h for p in plan.purchases)
    assert {span.node for span in plan.spans} <= {
        f"{p.offer}/{n}" for p in plan.purchases for n in range(p.machines)
    }
    assert plan.gap == pytest.approx(0.0, abs=1e-6)
    assert plan.sources == ("made up",)


def test_a_slow_network_needs_more_pipelines():
    """1000 output tokens/s with twice as many of prompts, 2048 bytes each: 6.1 MB/s."""
    asked = problem(20.0)
    slow = replace(asked, catalog=Shelf(network_gb_per_s=0.004))
    free, bound = SpansPlanner().plan(asked), SpansPlanner().plan(slow)
    assert bound.usd_per_h > free.usd_per_h
    assert max(bound.flow_tokens_per_s.values()) * 3 * 2048 <= 0.004e9 * (1 + 1e-9)


def test_more_demand_costs_more():
    costs = [SpansPlanner().plan(problem(rate)).usd_per_h for rate in (2.0, 20.0, 40.0)]
    assert costs[0] < costs[1] < costs[2]


def test_a_short_time_per_token_takes_smaller_batches_and_more_machines():
    free = SpansPlanner().plan(problem(20.0))
    bound = 2 * 8 * (2e-3 + 5e-5 * 4)  # of 4 sequences on the big kind
    tight = SpansPlanner().plan(problem(20.0, Slo(tpot_s=bound)))
    assert tight.usd_per_h > free.usd_per_h


def test_a_first_token_faster_than_the_layers_is_infeasible():
    with pytest.raises(InfeasibleError, match="memory or SLO"):
        SpansPlanner().plan(problem(1.0, Slo(ttft_s=2 * 8 * 1e-5 * 99)))
    kinds = {
        purchase.shape.kind
        for purchase in SpansPlanner().plan(problem(1.0, Slo(ttft_s=2 * 8 * 1e-5 * 101))).purchases
    }
    assert kinds == {"big"}


def test_quota_binds_and_is_told():
    with pytest.raises(InfeasibleError, match="quota: all machines together carry"):
        SpansPlanner().plan(problem(500.0))
    with pytest.raises(InfeasibleError, match="memory: all machines together hold 9"):
        SpansPlanner().plan(replace(problem(1.0, quota=1), model=replace(MODEL, layers=10)))


def test_without_model_or_times_of_layers_it_refuses():
    with pytest.raises(ValueError, match="model: layer spans"):
        SpansPlanner().plan(replace(problem(1.0), model=None))

    class NoLayers:
        source = "table of replicas"
        requests_per_s, kv_tokens = Times.requests_per_s, Times.kv_tokens

    with pytest.raises(ValueError, match="table of replicas has no times of single layers"):
        SpansPlanner().plan(replace(problem(1.0), profile=NoLayers()))
