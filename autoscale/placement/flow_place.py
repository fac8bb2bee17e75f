"""Where which layers lie so that most tokens flow, and which machines carry a given flow at least
cost: bound, blocks, integer program and local search put together, anytime."""

import time
from dataclasses import dataclass, replace

from autoscale.placement.flow import layout_flow
from autoscale.placement.flow_blocks import GRID, BlockPool
from autoscale.placement.flow_bound import cost_bound, flow_bound
from autoscale.placement.flow_exact import (
    Exact,
    counted_size,
    linked_size,
    solve_cheapest,
    solve_counted,
    solve_linked,
)
from autoscale.placement.flow_search import improve
from autoscale.placement.flow_starts import starts
from autoscale.placement.planner import InfeasibleError
from autoscale.placement.spans_layout import Layout, Links, SpanProblem, check_layout, on_machines

TOLERANCE = 1e-3
COUNTED_LIMIT, LINKED_LIMIT = 4000, 6000
RESTARTS = 3
FINENESS = 3  # blocks are looked for again on grids so many times finer


@dataclass(frozen=True)
class Placement:
    """tokens_per_s: the max-flow of `layout`; no layout exceeds bound_tokens_per_s."""

    layout: Layout
    tokens_per_s: float
    bound_tokens_per_s: float
    solver: str
    solved_s: float

    @property
    def gap(self) -> float:
        """(bound - flow) / bound."""
        return max(0.0, 1.0 - self.tokens_per_s / self.bound_tokens_per_s)


def place(
    problem: SpanProblem, *, deadline_s: float = 30.0, tolerance: float = TOLERANCE, seed: int = 0
) -> Placement:
    """The layout of most flow found in deadline_s, or within `tolerance` of the bound, whichever
    comes first. InfeasibleError where the nodes cannot hold the model."""
    began = time.monotonic()
    deadline = began + deadline_s
    _check_room(problem)
    best, flow, solver = _best_start(problem)
    bound = max(flow_bound(problem, at_least=flow), flow)
    for fineness in range(1, 2 if _exact_fits(problem) else FINENESS + 1):
        if flow < bound * (1 - tolerance) and time.monotonic() < began + 0.3 * deadline_s:
            aim = _Aim(flow, bound, began + 0.6 * deadline_s, tolerance, fineness)
            found = _by_blocks(problem, aim)
            if found is not None and found[1] > flow:
                (best, flow), solver = found, "blocks"
    if flow < bound * (1 - tolerance):
        exact = _exactly(problem, flow, bound, deadline)
        if exact is not None:
            bound = max(min(bound, exact.bound), flow)
            if exact.layout is not None:
                best, solver = exact.layout, "integer program"
                flow = layout_flow(problem, best).tokens_per_s
                bound = max(bound, flow)
    if flow < bound * (1 - tolerance) and not (problem.free_links and not problem.partial):
        tried, better = _search(problem, best, bound, deadline, seed)
        if better > flow:
            best, flow, solver = tried, better, f"{solver}, local search"
    if flow <= 0:
        raise InfeasibleError(f"no layout found whose links carry anything in {deadline_s} s")
    check_layout(problem, best)
    return Placement(best, flow, bound, solver, time.monotonic() - began)


def _check_room(problem: SpanProblem) -> None:
    """Memory binds where not even all nodes at their fullest hold the model once."""
    held = sum(
        max(
            (s.most_layers * (pool.accelerators // s.tensor) for s in problem.stages
             if s.pool == pool.name), default=0,
        ) * pool.machines
        for pool in problem.pools
    )  # fmt: skip
    if held < problem.layers:
        raise InfeasibleError(
            f"memory: all machines together hold {held} layers, the model has {problem.layers}"
        )


def _best_start(problem: SpanProblem) -> tuple[Layout, float, str]:
    flows = [(layout_flow(problem, layout).tokens_per_s, layout) for layout in starts(problem)]
    flow, layout = max(flows, key=lambda pair: pair[0])
    return layout, flow, "a simple layout"


def _search(
    problem: SpanProblem, best: Layout, bound: float, deadline: float, seed: int
) -> tuple[Layout, float]:
    """From the best layout so far, then from simple ones, the time shared out between them."""
    simple = sorted(starts(problem), key=lambda layout: -layout_flow(problem, layout).tokens_per_s)
    begin = [best, *simple[: RESTARTS - 1]]
    found = best, layout_flow(problem, best).tokens_per_s
    for number, start in enumerate(begin):
        share = (deadline - time.monotonic()) / (len(begin) - number)
        until = time.monotonic() + share
        tried = improve(problem, start, deadline=until, seed=seed + number, enough=bound)
        found = max(found, tried, key=lambda pair: pair[1])
        if found[1] >= bound * (1 - 1e-6):
            break
    return found


@dataclass(frozen=True)
class _Aim:
    """Between which flows to look for blocks, until when (time.monotonic), how finely."""

    flow: float
    bound: float
    deadline: float
    tolerance: float
    fineness: int


def _by_blocks(problem: SpanProblem, aim: _Aim) -> tuple[Layout, float] | None:
    """Bisection of the flow that blocks reach; measured with the links as they are."""
    free = replace(problem, links=Links(), partial=False)
    best: tuple[Layout, float] | None = None
    low, high = aim.flow, aim.bound * (1 + 1e-9)
    target = high
    while time.monotonic() < aim.deadline:
        pool = BlockPool(free, target, grid=aim.fineness * GRID)
        placed = pool.cover(aim.deadline)
        if placed is None:
            high = target
        else:
            layout = on_machines(problem, placed)
            low = max(target, layout_flow(free, layout).tokens_per_s)
            real = layout_flow(problem, layout).tokens_per_s
            if best is None or real > best[1]:
                best = layout, real
        if high - low <= max(0.3 * aim.tolerance * high, 1e-6 * aim.bound):
            break
        target = (low + high) / 2
    return best


def _exact_fits(problem: SpanProblem) -> bool:
    """Whether the integer program is small enough to be tried."""
    if problem.free_links:
        widened = counted_size(problem) * (problem.layers if problem.partial else 1)
        return widened <= COUNTED_LIMIT
    return linked_size(problem) <= LINKED_LIMIT


def _exactly(problem: SpanProblem, flow: float, bound: float, deadline: float) -> Exact | None:
    """By integer program where it is small enough."""
    if not _exact_fits(problem):
        return None
    solve = solve_counted if problem.free_links else solve_linked
    return solve(problem, flow * (1 + 1e-7), bound, deadline)


@dataclass(frozen=True)
class Bought:
    """machines: of each pool. No choice of machines costs less than bound_usd_per_h."""

    placement: Placement
    machines: tuple[int, ...]
    usd_per_h: float
    bound_usd_per_h: float


def buy(problem: SpanProblem, tokens_per_s: float, *, deadline_s: float = 30.0) -> Bought:
    """The cheapest machines, at most those of the pools, and a layout that carries tokens_per_s.
    InfeasibleError with the most that they can carry; ValueError where links would bind."""
    began = time.monotonic()
    deadline = began + deadline_s
    if not problem.free_links:
        raise ValueError("links: buying takes links that carry more than any node; faster links")
    _check_room(problem)
    bound = cost_bound(problem, tokens_per_s)
    if bound is None:
        most = flow_bound(problem, at_least=0.0)
        raise InfeasibleError(
            f"quota: all machines together carry {most:.6g} tokens/s at most, not {tokens_per_s:g}"
        )
    found = BlockPool(problem, tokens_per_s).buy(began + 0.6 * deadline_s)
    placed = None if found is None else (on_machines(problem, found[0]), tuple(found[1]))
    cost = float("inf") if placed is None else _cost(problem, placed[1])
    if cost > bound * (1 + 1e-6) and counted_size(problem) <= COUNTED_LIMIT:
        exact = solve_cheapest(problem, tokens_per_s, deadline)
        bound = max(bound, min(exact.bound, cost))
        if exact.layout is not None and _cost(problem, exact.machines) < cost - 1e-9:
            placed, cost = (exact.layout, exact.machines), _cost(problem, exact.machines)
    if placed is None:
        raise InfeasibleError(f"no machines found that carry {tokens_per_s:g} tokens/s")
    layout, machines = placed
    flow = layout_flow(problem, layout).tokens_per_s
    took = time.monotonic() - began
    placement = Placement(layout, flow, max(flow, tokens_per_s), "blocks, integer program", took)
    return Bought(placement, machines, cost, bound)


def _cost(problem: SpanProblem, machines: tuple[int, ...]) -> float:
    return sum(count * pool.usd_per_h for count, pool in zip(machines, problem.pools, strict=True))
