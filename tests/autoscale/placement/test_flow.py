"""Max-flow against networkx; layouts and purchases against every one there is."""

import networkx  # type: ignore[import-untyped]
import numpy as np
import pytest

from autoscale.placement.flow import FlowNetwork, layout_flow
from autoscale.placement.flow_bound import capacity_bound, flow_bound, may_carry
from autoscale.placement.flow_place import buy, place
from autoscale.placement.flow_starts import starts
from autoscale.placement.planner import InfeasibleError
from autoscale.placement.spans_layout import (
    Layout,
    Links,
    Node,
    Pool,
    SpanProblem,
    Stage,
    check_layout,
)
from tests.autoscale.placement import flow_oracle

SEED = int(np.random.SeedSequence().generate_state(1)[0])


@pytest.mark.parametrize("seed", range(SEED, SEED + 30))
def test_max_flow_is_that_of_networkx(seed: int):
    random = np.random.default_rng(seed)
    graph, network = networkx.DiGraph(), FlowNetwork()
    for _ in range(int(random.integers(5, 60))):
        tail, head = (int(v) for v in random.choice(12, 2, replace=False))
        room = float(random.uniform(0, 10))
        if not graph.has_edge(tail, head):
            graph.add_edge(tail, head, capacity=room)
            network.add(tail, head, room)
    graph.add_nodes_from((0, 1))
    wanted = networkx.maximum_flow_value(graph, 0, 1)
    assert network.solve(0, 1) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("seed", range(SEED, SEED + 25))
def test_place_finds_the_best_of_all_layouts(seed: int):
    problem = flow_oracle.random_problem(np.random.default_rng(seed), most_layouts=800)
    wanted = flow_oracle.best(problem)
    if wanted == 0:
        with pytest.raises(InfeasibleError):
            place(problem, tolerance=1e-9)
        return
    placed = place(problem, tolerance=1e-9)
    check_layout(problem, placed.layout)
    assert placed.tokens_per_s == pytest.approx(wanted, rel=1e-6)
    assert placed.bound_tokens_per_s >= wanted * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(SEED, SEED + 20))
def test_bounds_hold_for_every_layout(seed: int):
    problem = flow_oracle.random_problem(np.random.default_rng(seed), most_layouts=800)
    wanted = flow_oracle.best(problem)
    bound = flow_bound(problem, at_least=0.0)
    assert wanted * (1 - 1e-6) <= bound <= capacity_bound(problem) * (1 + 1e-6)


def free_problem(random: np.random.Generator) -> SpanProblem:
    while True:
        problem = flow_oracle.random_problem(random, most_layouts=200)
        if problem.free_links and not problem.partial:
            return problem


@pytest.mark.parametrize("seed", range(SEED, SEED + 20))
def test_buy_is_the_cheapest_of_all_purchases(seed: int):
    random = np.random.default_rng(seed)
    problem = free_problem(random)
    asked = max(1.0, flow_oracle.best(problem) * random.uniform(0.2, 1.1))
    wanted = flow_oracle.cheapest(problem, asked)
    if wanted == float("inf"):
        with pytest.raises(InfeasibleError):
            buy(problem, asked)
        return
    bought = buy(problem, asked)
    assert bought.usd_per_h == pytest.approx(wanted)
    assert bought.bound_usd_per_h <= wanted + 1e-6
    assert bought.placement.tokens_per_s >= asked * (1 - 1e-6)


def test_the_bound_by_patterns_is_below_that_by_capacity_where_rates_do_not_add_up():
    """Two nodes of 10 tokens/s can pass 10 or 20, never 15."""
    problem = SpanProblem(4, (Pool("a", 6),), (Stage("a", (10.0,)),))
    assert capacity_bound(problem) == pytest.approx(15.0)
    assert not may_carry(problem, 10.1)
    assert may_carry(problem, 10.0)


def test_partial_inference_lets_spans_overlap():
    nodes = (Node("a-0", 0, 0, 3), Node("a-1", 0, 2, 4))
    stages = (Stage("a", (9.0, 9.0, 9.0)),)
    flows = [
        layout_flow(
            SpanProblem(4, (Pool("a", 2),), stages, partial=partial), Layout(nodes)
        ).tokens_per_s
        for partial in (False, True)
    ]
    assert flows == [0.0, 9.0]


def test_a_tensor_degree_per_stage_is_chosen():
    """Two layers that fit only on both accelerators, or one on each: two stages of one win."""
    pool = Pool("pair", 1, accelerators=2)
    stages = (Stage("pair", (10.0,), tensor=1), Stage("pair", (8.0, 7.0), tensor=2))
    placed = place(SpanProblem(2, (pool,), stages), tolerance=1e-9)
    assert placed.tokens_per_s == 10.0
    assert {node.machine for node in placed.layout.nodes} == {"pair-0"}
    slower = (Stage("pair", (5.0,), tensor=1), stages[1])
    assert place(SpanProblem(2, (pool,), slower), tolerance=1e-9).tokens_per_s == 7.0


def test_a_slow_link_is_worked_around():
    names = ("x", "y", "z")
    links = Links(between=50.0, pairs={("x", "y"): 1.0, ("y", "x"): 1.0})
    problem = SpanProblem(2, (Pool("a", 3, names=names),), (Stage("a", (10.0,)),), links)
    assert place(problem, tolerance=1e-9).tokens_per_s == 10.0


def test_too_little_memory_is_told():
    with pytest.raises(InfeasibleError, match="memory: .* 3 layers, the model has 4"):
        place(SpanProblem(4, (Pool("a", 3),), (Stage("a", (10.0,)),)))


def test_too_little_quota_is_told():
    with pytest.raises(InfeasibleError, match="quota: .* 10 tokens/s at most, not 11"):
        buy(SpanProblem(3, (Pool("a", 3, usd_per_h=1.0),), (Stage("a", (10.0,)),)), 11.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 0}, "layers = 0"),
        ({"stages": (Stage("b", (1.0,)),)}, "stage of pool 'b': known are a"),
        ({"stages": (Stage("a", (1.0, -1.0)),)}, "tokens_per_s of a"),
        ({"stages": (Stage("a", (1.0,), tensor=2),)}, "tensor = 2: a has 1"),
        ({"pools": (Pool("a", 1, names=("x", "y")),)}, "2 names for 1 machines"),
        ({"pools": (Pool("a", 1), Pool("a", 2))}, "two have the same name"),
        (
            {"pools": (Pool("a", 1, accelerators=3),), "stages": (Stage("a", (1.0,), tensor=2),)},
            "each has to divide the next",
        ),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], says: str):
    known: dict[str, object] = {
        "layers": 1, "pools": (Pool("a", 1),), "stages": (Stage("a", (1.0,)),)
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        SpanProblem(**(known | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "node", [Node("a-0", 0, 0, 3), Node("a-0", 0, -1, 1), Node("a-9", 0, 0, 1)]
)
def test_layouts_that_cannot_be_are_refused(node: Node):
    problem = SpanProblem(2, (Pool("a", 2),), (Stage("a", (5.0, 4.0)),))
    check_layout(problem, Layout((Node("a-0", 0, 0, 2),)))
    with pytest.raises(ValueError):
        check_layout(problem, Layout((node,)))


def test_every_start_is_a_layout():
    problem = SpanProblem(
        12,
        (Pool("a", 4), Pool("b", 7)),
        (Stage("a", (90.0, 45.0, 30.0, 22.0)), Stage("b", (30.0, 14.0, 9.0))),
    )
    found = starts(problem)
    assert len(found) >= 3
    for layout in found:
        check_layout(problem, layout)
        assert layout_flow(problem, layout).tokens_per_s > 0
