"""Proof rows of layer spans over unlike nodes: Helix's published programs, exhaustive search, how
planning grows, routing shares."""

import time
from collections import Counter
from collections.abc import Iterator
from math import inf
from random import Random

import networkx  # type: ignore[import-untyped]
import numpy as np

from autoscale.placement.feasible import check
from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_place import Placement, buy, place
from autoscale.placement.flow_rates import LayerLoad, LayerPace, span_rates
from autoscale.placement.flow_routing import FlowRouter
from autoscale.placement.planner import InfeasibleError
from autoscale.placement.spans import SpansPlanner
from autoscale.placement.spans_layout import Layout, Pool, SpanProblem, Stage
from tests.autoscale.placement import flow_oracle
from tests.autoscale.placement.small import random_problem
from tests.prove import helix_data
from tests.prove.row import Row

INSTANCES, CHECKED = 200, 40
TARGETS = {"a100": 1.0, "l4": 0.99, "t4": 0.99}
SIZES = (8, 16, 32, 64, 128)
LAYERS_70B = 80
# Of Llama 2 70B in 16 bits: a layer's weights, and one token's keys and values in it.
LAYER_BYTES, KV_BYTES, INPUT_TOKENS, OUTPUT_TOKENS = 1.711e9, 4096.0, 763.0, 232.0
KINDS = {
    "a100": 40e9, "l4": 24e9, "t4": 16e9, "v100": 16e9, "l4x2": 48e9, "t4x4": 64e9
}  # fmt: skip


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about five minutes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    yield exhaustive_row(seed)
    yield cheapest_row(seed)
    yield routing_row(seed)
    yield checked_row(seed)
    if not helix_data.SINGLE.exists():
        yield Row(
            "Helix's programs, layouts and layer times", "measured", "skipped, data absent", True
        )
        return
    for kind in TARGETS:
        yield helix_row(kind)
    yield from layout_rows()
    yield from growth_rows()


def exhaustive_row(seed: int) -> Row:
    """Random small problems, links that bind and partial inference among them."""
    random, equal, infeasible = np.random.default_rng(seed), 0, 0
    for _ in range(INSTANCES):
        problem = flow_oracle.random_problem(random, most_layouts=800)
        wanted = flow_oracle.best(problem)
        try:
            found = place(problem, tolerance=1e-9).tokens_per_s
        except InfeasibleError:
            found = 0.0
            infeasible += 1
        equal += abs(found - wanted) <= 1e-6 * max(1, wanted)
    measured = f"{equal} of {INSTANCES}, {infeasible} infeasible (seed {seed})"
    return Row("layer spans: flow = best of all layouts", "all", measured, equal == INSTANCES)


def cheapest_row(seed: int) -> Row:
    """The cheapest machines for a flow, against every number of each."""
    random, equal, infeasible, done = np.random.default_rng(seed + 1), 0, 0, 0
    while done < INSTANCES:
        problem = flow_oracle.random_problem(random, most_layouts=150)
        if not problem.free_links or problem.partial:
            continue
        done += 1
        asked = max(1.0, flow_oracle.best(problem) * random.uniform(0.2, 1.1))
        wanted = flow_oracle.cheapest(problem, asked)
        try:
            found = buy(problem, asked).usd_per_h
        except InfeasibleError:
            found = inf
            infeasible += 1
        equal += found == wanted or abs(found - wanted) < 1e-6
    measured = f"{equal} of {INSTANCES}, {infeasible} infeasible (seed {seed + 1})"
    return Row("layer spans: cost = cheapest of all purchases", "all", measured, equal == INSTANCES)


def helix_row(kind: str) -> Row:
    """Our flow against Gurobi's, checked by networkx and in every row of the published program."""
    program = helix_data.published(kind)
    problem = program.problem(kind)
    placed = place(problem, deadline_s=100, tolerance=1e-7)
    checked = by_networkx(problem, placed.layout)
    broken = program.worst_row(placed.layout, layout_flow(problem, placed.layout).links)
    share = placed.tokens_per_s / program.published
    proved = "proved best" if placed.gap < 1e-5 else f"gap {placed.gap:.2%}"
    measured = (
        f"{placed.tokens_per_s:.3f} ({share:.1%}), {proved}, {placed.solved_s:.1f} s; networkx "
        f"{checked:.3f}; worst row of theirs off by {broken:.1e}"
    )
    ok = share >= TARGETS[kind] - 1e-9 and abs(checked - placed.tokens_per_s) < 1e-6
    ok = ok and broken < 1e-6 * placed.tokens_per_s and placed.solved_s <= 120
    name = f"Helix 30B, {kind}: flow in 120 s"
    return Row(name, f">= {TARGETS[kind]:.0%} of {program.published:.3f}", measured, ok)


def checked_row(seed: int) -> Row:
    """Plans of the planner of spans, by the checker that knows nothing of it."""
    random, faults, done = Random(seed), list[str](), 0
    while done < CHECKED:
        problem = random_problem(random)
        try:
            plan = SpansPlanner().plan(problem)
        except InfeasibleError:
            continue
        done += 1
        faults += [fault.what for fault in check(plan, problem, seed=seed).faults]
    name = f"plans of layer spans checked: {CHECKED} random problems (seed {seed})"
    first = f": {faults[0]}" if faults else ""
    return Row(name, "no fault", f"{len(faults)} faults{first}", not faults)


def by_networkx(problem: SpanProblem, layout: Layout) -> float:
    """The flow of a layout, by another library from the published rules: a link where spans
    meet."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(("s", "t"))
    for n, node in enumerate(layout.nodes):
        pace = problem.stages[node.stage].tokens_per_s[node.stop - node.start - 1]
        graph.add_edge(("in", n), ("out", n), capacity=pace)
        if node.start == 0:
            graph.add_edge("s", ("in", n), capacity=problem.links.enter)
        if node.stop == problem.layers:
            graph.add_edge(("out", n), "t", capacity=problem.links.leave)
        for m, other in enumerate(layout.nodes):
            inside = problem.partial and other.start < node.stop < other.stop
            if node.stop == other.start or inside:
                graph.add_edge(("out", n), ("in", m), capacity=problem.links.between)
    return float(networkx.maximum_flow_value(graph, "s", "t"))


def layout_rows() -> Iterator[Row]:
    """The 24 nodes of three kinds, against the published layouts of Swarm and Petals."""
    problem, overlapping = helix_data.mixed_problem(), helix_data.mixed_problem(partial=True)
    placed = place(problem, deadline_s=60)
    checked = by_networkx(problem, placed.layout)
    for name, targeted in (("swarm", 2.0), ("petals", 1.0)):
        layout = helix_data.published_layout(name)
        theirs = by_networkx(overlapping, layout)
        ratio = checked / theirs if theirs else inf
        limit = placed.bound_tokens_per_s / theirs if theirs else inf
        measured = (
            f"{checked:.1f} / {theirs:.1f} = {ratio:.3f} x; no layout exceeds {limit:.3f} x (bound)"
        )
        ok = ratio >= targeted and abs(checked - placed.tokens_per_s) < 1e-6 * checked
        yield Row(f"24 nodes, 30B: flow over {name}'s", f">= {targeted} x", measured, ok)


def kind_rates(kind: str) -> tuple[float, ...]:
    """Of Llama 2 70B, from the published layer times."""
    prompt, decode = (
        np.array(helix_data.times("llama2_70b", kind, p)) for p in ("prompt", "decode")
    )
    load = LayerLoad(LAYER_BYTES, KV_BYTES, INPUT_TOKENS, OUTPUT_TOKENS)
    pace = LayerPace(
        float(np.interp(INPUT_TOKENS, prompt[:, 0], prompt[:, 1])) / 1000,
        lambda batch: float(np.interp(max(batch, decode[1, 0]), decode[:, 0], decode[:, 1])) / 1000,
        float(decode[-1, 0]),
    )
    return span_rates(load, pace, KINDS[kind], LAYERS_70B)


def growth_rows() -> Iterator[Row]:
    """Six kinds in equal shares, 80 layers: time to a gap of 2 % by number of nodes."""
    stages = tuple(Stage(kind, kind_rates(kind)) for kind in KINDS)
    told, within = [], None
    for nodes in SIZES:
        counts = [nodes // 6 + (n < nodes % 6) for n in range(6)]
        pools = tuple(Pool(kind, count) for kind, count in zip(KINDS, counts, strict=True))
        problem = SpanProblem(LAYERS_70B, pools, stages)
        try:
            placed = place(problem, deadline_s=30, tolerance=0.02)
        except InfeasibleError as refusal:
            told.append(f"{nodes}: {refusal}")
            continue
        told.append(f"{nodes}: {placed.solved_s:.1f} s, {placed.gap:.2%}")
        within = placed if nodes == 64 else within
    assert within is not None
    measured = f"{within.solved_s:.1f} s, gap {within.gap:.2%}, {within.tokens_per_s:.0f} tokens/s"
    ok = within.solved_s <= 30 and within.gap <= 0.02
    yield Row("64 nodes x 6 kinds x 80 layers", "<= 30 s, gap <= 2 %", measured, ok)
    yield Row("the same by number of nodes: time to 2 %, gap", "told", "; ".join(told), True)


def routing_row(seed: int) -> Row:
    """10,000 requests over a layout of two kinds."""
    stages = (Stage("a", (90.0, 45.0, 29.0)), Stage("b", (31.0, 14.0)))
    problem = SpanProblem(6, (Pool("a", 5), Pool("b", 9)), stages)
    flow = layout_flow(problem, _layout(problem, seed).layout)
    router, count = FlowRouter(flow.links), Counter[tuple[str, str]]()
    for _ in range(10_000):
        ends = ["source", *(router.pipeline(1) or ()), "sink"]
        count.update(zip(ends, ends[1:], strict=False))
    shares = {link: tokens / flow.tokens_per_s for link, tokens in flow.links.items()}
    worst = max(abs(count[link] / 10_000 / share - 1) for link, share in shares.items())
    measured = f"{worst:.2%} at worst of {len(shares)} links"
    return Row(
        "routing shares over 10,000 requests", "within 2 % of the flow", measured, worst <= 0.02
    )


def _layout(problem: SpanProblem, seed: int) -> Placement:
    return place(problem, seed=seed % 1000, deadline_s=5)


if __name__ == "__main__":
    began = time.monotonic()
    for each in rows():
        print(each, flush=True)
    print(f"{time.monotonic() - began:.0f} s")
