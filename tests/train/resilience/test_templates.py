"""Oobleck's planner against brute force and enumeration."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.parallel.pipeline_layout import Span
from train.resilience.templates import (
    Cutter,
    LayerCosts,
    Planner,
    Template,
    regroup,
    share_micros,
)


def brute(costs: LayerCosts, workers: int, micros: int) -> float | None:
    """The fastest step over every cut, from the definition."""
    layers, best = len(costs.seconds), None
    for inner in combinations(range(1, layers), workers - 1):
        ends = [0, *inner, layers]
        stages = [sum(costs.seconds[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        state = [sum(costs.state_bytes[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        if max(state) <= costs.memory_bytes:
            through = sum(stages) + sum(costs.send_s[n - 1] for n in inner)
            step = through + (micros - 1) * max(stages)
            best = step if best is None else min(best, step)
    return best


def costs_of(layers: int, draw: st.DataObject) -> LayerCosts:
    def numbers(low: int, high: int) -> tuple[float, ...]:
        return tuple(draw.draw(st.integers(low, high)) for _ in range(layers))

    return LayerCosts(
        numbers(1, 20), numbers(1, 9), numbers(0, 6), draw.draw(st.sampled_from([9, 14, 1e9]))
    )


@given(st.data(), st.integers(1, 10), st.integers(1, 9))
def test_cut_equals_brute_force(draw: st.DataObject, layers: int, micros: int):
    costs = costs_of(layers, draw)
    cutter = Cutter(costs)
    for workers in range(1, layers + 1):
        found, wanted = cutter.template(workers, micros), brute(costs, workers, micros)
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.step_s(micros) == pytest.approx(wanted, rel=1e-12)
            assert [s.start for s in found.spans] == [0, *(s.stop for s in found.spans[:-1])]
            stages = [sum(costs.seconds[slice(*span)]) for span in found.spans]
            assert found.slowest_s == max(stages)


@pytest.mark.parametrize("fewest", [1, 2, 3, 5])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_every_number_of_workers_is_covered(fewest: int, failures: int):
    """To 40 workers, against a count of all sums. 2 n0 - 1 layers or more leave no spare."""
    layers = 2 * fewest
    costs = LayerCosts((1.0,) * layers, (1.0,) * layers, (0.0,) * layers, 2.0)
    planner = Planner(costs, 48, failures)
    assert planner.fewest == fewest
    for workers in range((failures + 1) * fewest, 41):
        sums = ways(workers, sorted(planner.templates))
        wanted = sum(count for pipelines, count in sums.items() if pipelines > failures)
        assert wanted > 0
        if workers <= 24:
            covers = planner.covers(workers)
            assert len(set(covers)) == len(covers) == wanted
            assert all(sum(c) == workers and len(c) > failures for c in covers)
            plan = planner.plan(workers)
            assert plan.spares == 0 and sum(len(t.spans) for t in plan.templates) == workers
    with pytest.raises(ValueError, match="workers"):
        planner.plan((failures + 1) * fewest - 1)


def ways(total: int, sizes: list[int]) -> dict[int, int]:
    """How many multisets of sizes have this sum, by how many members they have (counted without
    listing them)."""
    table: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(total)]
    for size in sizes:
        for amount in range(size, total + 1):
            for members, count in list(table[amount - size].items()):
                table[amount][members + 1] = table[amount].get(members + 1, 0) + count
    return table[total]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.data())
def test_micro_batches_are_shared_best(times: list[tuple[int, int]], draw: st.DataObject):
    pipelines = [Template((Span(0, 1),), slow + more, slow) for slow, more in times]
    micros = draw.draw(st.integers(len(pipelines), 9))
    shares = share_micros(pipelines, micros)
    assert sum(shares) == micros and min(shares) >= 1

    def slowest(split: tuple[int, ...]) -> float:
        return max(
            p.through_s + (m - 1) * p.slowest_s for p, m in zip(pipelines, split, strict=True)
        )

    every = product(range(1, micros + 1), repeat=len(pipelines))
    assert slowest(shares) == min(slowest(split) for split in every if sum(split) == micros)


def test_plan_is_the_fastest_of_all_covers():
    costs = LayerCosts((3.0, 1.0, 1.0, 4.0, 2.0), (1.0,) * 5, (0.5,) * 5, 3.0)
    planner = Planner(costs, 8)
    for workers in range(4, 12):
        best = min(planner.of_sizes(sizes).step_s for sizes in planner.covers(workers))
        assert planner.plan(workers).step_s == best


def test_regroup():
    assert regroup([[0, 1], [2, 4]], 2, 1) == [[0, 1], [2, 4]]
    assert regroup([[0], [2, 3, 4]], 2, 1) == [[0, 4], [2, 3]]  # borrowed
    assert regroup([[0], [1, 2], [3, 4]], 2, 1) == [[1, 2, 0], [3, 4]]  # joined
    with pytest.raises(ValueError, match="2 pipelines of 2 workers take 4"):
        regroup([[0, 1, 2]], 2, 1)
    with pytest.raises(ValueError, match="workers are left"):
        regroup([[0], [1, 2]], 2, 1)
