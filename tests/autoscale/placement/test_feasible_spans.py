"""Spans and flows: a layout with networkx's flow passes, and what breaks it is seen."""

from dataclasses import replace

import networkx as nx  # type: ignore[import-untyped]
import pytest

from autoscale.catalog.catalog import PricedCatalog
from autoscale.catalog.kinds import read_kinds
from autoscale.catalog.model import ModelSize
from autoscale.catalog.offer import Offer
from autoscale.catalog.roofline import Roofline
from autoscale.placement.demand import Demand
from autoscale.placement.feasible import check
from autoscale.placement.plan import LayerSpan, Plan, Purchase, ReplicaShape
from autoscale.placement.planner import Problem

MODEL = ModelSize("six", 6, 1024, 16, 4, 64, 4096, 32000)
KINDS = read_kinds()
OFFERS = (
    Offer("t4s", "t4", 1, "r", "z", "on_demand", 0.5),
    Offer("l4s", "l4", 1, "r", "z", "on_demand", 0.8),
)
PROBLEM = Problem(Demand({}), PricedCatalog(KINDS, OFFERS), Roofline(KINDS, MODEL), (), model=MODEL)
SPANS = (LayerSpan("t4s/0", 0, 3), LayerSpan("t4s/1", 3, 6), LayerSpan("l4s/0", 0, 6))
CAPACITY = {"t4s/0": 900.0, "t4s/1": 700.0, "l4s/0": 500.0}


def plan() -> Plan:
    """Two t4 in a row beside an l4 that holds all six layers."""
    graph = nx.DiGraph()
    for node, capacity in CAPACITY.items():
        graph.add_edge(f"{node} in", f"{node} out", capacity=capacity)
    for start, end in (("source", "t4s/0"), ("source", "l4s/0")):
        graph.add_edge(start, f"{end} in")
    graph.add_edge("t4s/0 out", "t4s/1 in")
    for node in ("t4s/1", "l4s/0"):
        graph.add_edge(f"{node} out", "sink")
    total, flows = nx.maximum_flow(graph, "source", "sink")
    assert total == 1200.0
    names = {name: name.removesuffix(" in").removesuffix(" out") for name in graph}
    edges = {
        (names[start], names[end]): float(flow)
        for start, ends in flows.items()
        for end, flow in ends.items()
        if names[start] != names[end] and flow
    }
    purchases = (
        Purchase("t4s", 2, ReplicaShape("t4"), 0, 1.0),
        Purchase("l4s", 1, ReplicaShape("l4"), 0, 0.8),
    )
    return Plan(purchases, 1.8, 0.0, "", spans=SPANS, flow_tokens_per_s=edges)


def test_a_true_layout_has_no_fault():
    assert check(plan(), PROBLEM).faults == ()


def changed_flow(edge: tuple[str, str], tokens: float) -> dict[tuple[str, str], float]:
    return {**plan().flow_tokens_per_s, edge: tokens}


BROKEN = {
    "a layer nowhere": replace(plan(), spans=(SPANS[0], LayerSpan("t4s/1", 4, 6))),
    "a machine that is not bought": replace(plan(), spans=(*SPANS, LayerSpan("t4s/2", 0, 6))),
    "a machine twice": replace(plan(), spans=(*SPANS, LayerSpan("t4s/1", 0, 3))),
    "backwards": replace(plan(), spans=(*SPANS[1:], LayerSpan("t4s/0", 3, 0))),
    "what enters does not leave": replace(
        plan(), flow_tokens_per_s=changed_flow(("t4s/1", "sink"), 600.0)
    ),
    "layers that do not follow": replace(
        plan(), flow_tokens_per_s=changed_flow(("t4s/1", "t4s/0"), 1.0)
    ),
    "out of the middle": replace(plan(), flow_tokens_per_s=changed_flow(("t4s/0", "sink"), 1.0)),
    "no such node": replace(plan(), flow_tokens_per_s=changed_flow(("t4s/9", "sink"), 1.0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_is_seen(name: str):
    assert "flow" in {fault.subject for fault in check(BROKEN[name], PROBLEM).faults}


def test_a_link_and_a_node_carry_what_they_can():
    thin = tuple(replace(offer, network_gb_per_s=1e-3) for offer in OFFERS)
    narrow = replace(PROBLEM, catalog=PricedCatalog(KINDS, thin))
    sentences = [fault.what for fault in check(plan(), narrow).faults]
    # 1 MB/s carries 488.3 activations of 1,024 values of two bytes; token ids are smaller.
    assert sentences == ["t4s/0 -> t4s/1: 700.0 tokens/s, the link carries 488.3"]
    flood = {edge: 1e4 * flow for edge, flow in plan().flow_tokens_per_s.items()}
    faults = check(replace(plan(), flow_tokens_per_s=flood), PROBLEM).faults
    assert any("was measured to do" in fault.what for fault in faults)


def test_layers_that_do_not_fit_are_seen():
    tall = replace(PROBLEM, model=replace(MODEL, hidden=1 << 19))
    assert any("do not fit" in fault.what for fault in check(plan(), tall).faults)
