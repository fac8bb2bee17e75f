"""Blocks and local search on problems too large to try all; bounds are the measure."""

import time

import numpy as np

from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_bound import flow_bound
from autoscale.placement.flow_place import buy, place
from autoscale.placement.flow_search import improve
from autoscale.placement.flow_starts import equal_stages, starts
from autoscale.placement.spans_layout import Links, Pool, SpanProblem, Stage


def mixed(machines: tuple[int, ...], layers: int = 40, links: Links | None = None) -> SpanProblem:
    """Kinds of unlike speed and memory, efficiency falling as memory fills."""
    speeds, most = (20.0, 9.0, 6.0, 14.0), (10, 6, 4, 3)
    pools, stages = [], []
    for number, count in enumerate(machines):
        rates = tuple(
            1000 * speeds[number] / held * (1 - 0.4 * held / (most[number] + 1))
            for held in range(1, most[number] + 1)
        )
        pools.append(Pool(f"p{number}", count, usd_per_h=speeds[number] ** 0.8))
        stages.append(Stage(f"p{number}", rates))
    return SpanProblem(layers, tuple(pools), tuple(stages), links or Links())


def test_thirty_unlike_nodes_come_near_the_bound_and_beat_simple_layouts():
    problem = mixed((6, 8, 10, 6))
    placed = place(problem, deadline_s=20, tolerance=0.02)
    simple = max(layout_flow(problem, layout).tokens_per_s for layout in starts(problem))
    assert placed.gap < 0.02
    assert placed.tokens_per_s > 1.15 * simple
    assert placed.bound_tokens_per_s <= flow_bound(problem, at_least=0.0) * (1 + 1e-3)


def test_buying_for_a_flow_is_near_its_bound():
    problem = mixed((12, 16, 20, 12))
    bought = buy(problem, 2500.0, deadline_s=20)
    assert bought.placement.tokens_per_s >= 2500.0 * (1 - 1e-9)
    assert bought.usd_per_h <= 1.06 * bought.bound_usd_per_h


def two_halves(machines: int) -> Links:
    """A fast network among the even and among the odd, a slow one between."""
    names = [f"p0-{n}" for n in range(machines)]
    pairs = {
        (a, b): 40.0 for n, a in enumerate(names) for m, b in enumerate(names) if n % 2 != m % 2
    }
    return Links(pairs=pairs)


def test_local_search_uses_links_that_bind():
    """Eight nodes in two halves: two pipelines of four, each in its half, cross no slow link."""
    problem = SpanProblem(
        8, (Pool("p0", 8),), (Stage("p0", (400.0, 200.0, 120.0, 80.0)),), two_halves(8)
    )
    start = equal_stages(problem, 2)
    assert start is not None
    before = layout_flow(problem, start).tokens_per_s
    layout, flow = improve(problem, start, deadline=time.monotonic() + 20, seed=1, enough=400.0)
    assert flow == layout_flow(problem, layout).tokens_per_s
    assert flow == 400.0 > before


def test_place_with_links_that_bind_never_claims_what_they_do_not_carry():
    problem = mixed((3, 4, 4, 2), layers=20, links=Links(between=600.0))
    placed = place(problem, deadline_s=6)
    assert placed.tokens_per_s == layout_flow(problem, placed.layout).tokens_per_s
    crossing = [
        rate
        for (tail, head), rate in layout_flow(problem, placed.layout).links.items()
        if "source" not in (tail, head) and "sink" not in (tail, head)
    ]
    assert max(crossing) <= 600.0 * (1 + 1e-9)
    assert placed.tokens_per_s <= placed.bound_tokens_per_s


def test_more_nodes_never_carry_less():
    flows = [
        place(mixed((n, n, n, n)), deadline_s=10, tolerance=0.03).tokens_per_s for n in (3, 5, 8)
    ]
    assert list(np.sort(flows)) == flows
