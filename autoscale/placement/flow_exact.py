"""Layer spans as integer programs for HiGHS, small enough to be solved to proof.

Unlike Helix's formulation, spans are chosen whole (one binary for each start and number of layers),
so no big-M ties a switch to a start. Where links cannot bind, nodes that are alike are one integer
and tokens flow along layer boundaries (`solve_counted`); otherwise each machine has its own
variables (`solve_linked`). Flows are in units of a known upper bound, which also caps every node's
rate."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from autoscale.placement.spans_layout import Layout, Node, SpanProblem, on_machines

Placed = tuple[int, int, int]


class _Program:
    """Rows and columns of an integer program, as they come."""

    def __init__(self) -> None:
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._whole: list[int] = []
        self._rows: list[tuple[Mapping[int, float], float, float]] = []

    def variable(self, upper: float, *, cost: float = 0.0, whole: bool = False) -> int:
        self._cost.append(cost)
        self._upper.append(upper)
        self._whole.append(int(whole))
        return len(self._cost) - 1

    def row(self, weights: Mapping[int, float], low: float, high: float) -> None:
        self._rows.append((weights, low, high))

    def minimise(self, deadline: float) -> tuple[np.ndarray | None, float, bool]:
        """Values (None without any), a lower bound of the cost, whether the search is complete."""
        at = [n for n, (weights, _, _) in enumerate(self._rows) for _ in weights]
        columns = [c for weights, _, _ in self._rows for c in weights]
        values = [v for weights, _, _ in self._rows for v in weights.values()]
        shape = (len(self._rows), len(self._cost))
        matrix = coo_array((values, (at, columns)), shape=shape).tocsr()
        low, high = zip(*[(low, high) for _, low, high in self._rows], strict=True)
        solved = milp(
            self._cost,
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.array(self._whole),
            bounds=Bounds(0, self._upper),
            options={"time_limit": max(0.05, deadline - time.monotonic()), "mip_rel_gap": 1e-7},
        )
        bound = -inf if solved.mip_dual_bound is None else float(solved.mip_dual_bound)
        return solved.x, bound, solved.status in (0, 2)


@dataclass(frozen=True)
class Exact:
    """layout: None where there is none better than what was known. bound: on the flow, or on the
    cost in `solve_cheapest`; proved: the search went to its end."""

    layout: Layout | None
    bound: float
    proved: bool
    machines: tuple[int, ...] = ()


def counted_size(problem: SpanProblem) -> int:
    """Integers in the program of `solve_counted`."""
    return sum(
        problem.layers - held + 1
        for stage in problem.stages
        for held in range(1, min(stage.most_layers, problem.layers) + 1)
    )


def solve_counted(problem: SpanProblem, better_than: float, cap: float, deadline: float) -> Exact:
    """The layout of most flow above `better_than`, where links do not bind."""
    program = _Program()
    counts, leaving = _counted(program, problem, cap, objective=-1.0)
    for pool in problem.pools:
        use = {c: float(problem.stages[o].tensor) for (o, _, _), c in counts.items()
               if problem.stages[o].pool == pool.name}  # fmt: skip
        if use:
            program.row(use, 0.0, float(pool.total_accelerators))
    program.row(dict.fromkeys(leaving, 1.0), better_than / cap, 1.0)
    values, bound, proved = program.minimise(deadline)
    if values is None:
        return Exact(None, better_than if proved else cap, proved)
    return Exact(on_machines(problem, _chosen(counts, values)), -bound * cap, proved)


def solve_cheapest(problem: SpanProblem, flow: float, deadline: float) -> Exact:
    """The cheapest machines that carry `flow`, where links do not bind."""
    program = _Program()
    counts, leaving = _counted(program, problem, flow, objective=0.0)
    bought = []
    for pool in problem.pools:
        machines = program.variable(pool.machines, cost=pool.usd_per_h, whole=True)
        use = {c: float(problem.stages[o].tensor) for (o, _, _), c in counts.items()
               if problem.stages[o].pool == pool.name}  # fmt: skip
        program.row(use | {machines: -float(pool.accelerators)}, -inf, 0.0)
        bought.append(machines)
    program.row(dict.fromkeys(leaving, 1.0), 1.0, inf)
    values, bound, proved = program.minimise(deadline)
    if values is None:
        return Exact(None, inf if proved else max(bound, 0.0), proved)
    machines_of = tuple(round(values[column]) for column in bought)
    layout = on_machines(problem, _chosen(counts, values))
    return Exact(layout, bound, proved, machines_of)


def _counted(
    program: _Program, problem: SpanProblem, cap: float, *, objective: float
) -> tuple[dict[Placed, int], list[int]]:
    """Counts of each stage and span, and the flows that leave the front, with what ties them."""
    counts: dict[Placed, int] = {}
    balance: list[dict[int, float]] = [{} for _ in range(problem.layers + 1)]
    for number, stage in enumerate(problem.stages):
        most = problem.pools[problem.pool_of(number)].total_accelerators // stage.tensor
        for held in range(1, min(stage.most_layers, problem.layers) + 1):
            pace = min(stage.tokens_per_s[held - 1], cap) / cap
            for start in range(problem.layers - held + 1):
                count = program.variable(most, whole=True)
                counts[number, start, start + held] = count
                entries = range(start, start + held) if problem.partial else (start,)
                flows = [
                    program.variable(inf, cost=objective if entry == 0 else 0.0)
                    for entry in entries
                ]
                program.row(dict.fromkeys(flows, 1.0) | {count: -pace}, -inf, 0.0)
                for entry, flow in zip(entries, flows, strict=True):
                    balance[entry][flow] = 1.0
                    balance[start + held][flow] = -1.0
    for boundary in range(1, problem.layers):
        program.row(balance[boundary], 0.0, 0.0)
    return counts, list(balance[0])


def _chosen(counts: Mapping[Placed, int], values: np.ndarray) -> list[Placed]:
    return [placed for placed, column in counts.items() for _ in range(round(values[column]))]


Slot = tuple[str, int]  # a machine, and which of its possible nodes


def linked_size(problem: SpanProblem) -> int:
    """Binaries and flows in the program of `solve_linked`, about."""
    slots = sum(len(_slots(problem, pool.name)) for pool in problem.pools)
    return slots * counted_size(problem) + slots * slots * problem.layers


def _slots(problem: SpanProblem, pool_name: str) -> list[Slot]:
    least = min((s.tensor for s in problem.stages if s.pool == pool_name), default=0)
    pool = next(pool for pool in problem.pools if pool.name == pool_name)
    if not least:
        return []
    return [
        (pool.machine(n), slot)
        for n in range(pool.machines)
        for slot in range(pool.accelerators // least)
    ]


def solve_linked(problem: SpanProblem, better_than: float, cap: float, deadline: float) -> Exact:
    """The layout of most flow above `better_than`, links included."""
    program = _Program()
    spans: dict[Slot, dict[Placed, int]] = {}
    for pool in problem.pools:
        for slot in _slots(problem, pool.name):
            spans[slot] = _binaries(program, problem, pool.name)
            program.row(dict.fromkeys(spans[slot].values(), 1.0), 0.0, 1.0)
        _per_machine(program, problem, pool.name, spans)
    leaving = _linked_flows(program, problem, spans, cap)
    program.row(dict.fromkeys(leaving, 1.0), better_than / cap, 1.0)
    values, bound, proved = program.minimise(deadline)
    if values is None:
        return Exact(None, better_than if proved else cap, proved)
    nodes = [
        Node(machine, *placed)
        for (machine, _), binaries in spans.items()
        for placed, column in binaries.items()
        if values[column] > 0.5
    ]
    return Exact(Layout(tuple(nodes)), -bound * cap, proved)


def _binaries(program: _Program, problem: SpanProblem, pool: str) -> dict[Placed, int]:
    return {
        (number, start, start + held): program.variable(1.0, whole=True)
        for number, stage in enumerate(problem.stages)
        if stage.pool == pool
        for held in range(1, min(stage.most_layers, problem.layers) + 1)
        for start in range(problem.layers - held + 1)
    }


def _per_machine(
    program: _Program, problem: SpanProblem, pool_name: str, spans: Mapping[Slot, dict[Placed, int]]
) -> None:
    pool = next(pool for pool in problem.pools if pool.name == pool_name)
    for machine in {machine for machine, _ in _slots(problem, pool_name)}:
        use = {
            column: float(problem.stages[placed[0]].tensor)
            for slot, binaries in spans.items()
            if slot[0] == machine
            for placed, column in binaries.items()
        }
        program.row(use, 0.0, float(pool.accelerators))


def _linked_flows(
    program: _Program, problem: SpanProblem, spans: Mapping[Slot, dict[Placed, int]], cap: float
) -> list[int]:
    """Flows between nodes at each layer boundary; those that leave the front."""
    links, entering = problem.links, list[int]()
    into: dict[Slot, dict[int, float]] = {slot: {} for slot in spans}
    out: dict[Slot, dict[int, float]] = {slot: {} for slot in spans}
    for slot, binaries in spans.items():
        first = _flow(
            program, min(links.enter / cap, 1.0), [], _accepts(problem, binaries, 0), -1.0
        )
        ends = _ends(binaries, problem.layers)
        last = _flow(program, min(links.leave / cap, 1.0), ends, [], 0.0)
        into[slot][first], out[slot][last] = 1.0, 1.0
        entering.append(first)
        for other, theirs in spans.items():
            room = min(links.rate(slot[0], other[0]) / cap, 1.0)
            for boundary in range(1, problem.layers) if other != slot and room > 0 else ():
                senders = _ends(binaries, boundary)
                takers = _accepts(problem, theirs, boundary)
                if senders and takers:
                    flow = _flow(program, room, senders, takers, 0.0)
                    out[slot][flow], into[other][flow] = 1.0, 1.0
    for slot, binaries in spans.items():
        program.row(into[slot] | {f: -1.0 for f in out[slot]}, 0.0, 0.0)
        pace = {
            column: -min(problem.stages[o].tokens_per_s[stop - start - 1] / cap, 1.0)
            for (o, start, stop), column in binaries.items()
        }
        program.row(into[slot] | pace, -inf, 0.0)
    return entering


def _flow(
    program: _Program, room: float, senders: Sequence[int], takers: Sequence[int], cost: float
) -> int:
    """A flow of at most `room`, and of none unless one of each list is chosen."""
    flow = program.variable(room, cost=cost)
    for needed in (senders, takers):
        if needed:
            program.row({flow: 1.0} | dict.fromkeys(needed, -room), -inf, 0.0)
    return flow


def _ends(binaries: Mapping[Placed, int], boundary: int) -> list[int]:
    return [column for (_, _, stop), column in binaries.items() if stop == boundary]


def _accepts(problem: SpanProblem, binaries: Mapping[Placed, int], boundary: int) -> list[int]:
    """Spans that a request can enter at a boundary; the front enters only where a span starts."""
    return [
        column
        for (_, start, stop), column in binaries.items()
        if start == boundary or (problem.partial and boundary > 0 and start <= boundary < stop)
    ]
