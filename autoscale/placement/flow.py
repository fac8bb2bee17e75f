"""Max-flow, and the flow of tokens that a layout of layer spans carries."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

from autoscale.placement.spans_layout import Layout, Node, SpanProblem, node_names, rate

SOURCE, SINK = "source", "sink"


class FlowNetwork:
    """A directed network with real capacities; max-flow by Dinic's algorithm (1970): breadth-first
    levels, then blocking flows by depth-first search without recursion."""

    def __init__(self) -> None:
        self._place: dict[Hashable, int] = {}
        self._edges: list[list[int]] = []  # of each vertex, numbers of its edges
        self._head: list[int] = []  # edge e leads to _head[e]; e ^ 1 is its reverse
        self._left: list[float] = []
        self._capacity: list[float] = []

    def vertex(self, name: Hashable) -> int:
        if name not in self._place:
            self._place[name] = len(self._edges)
            self._edges.append([])
        return self._place[name]

    def add(self, tail: Hashable, head: Hashable, capacity: float) -> int:
        """An edge; its number, by which `flow` knows it."""
        number = len(self._head)
        for at, to, room in (
            (self.vertex(tail), self.vertex(head), capacity),
            (self.vertex(head), self.vertex(tail), 0.0),
        ):
            self._edges[at].append(len(self._head))
            self._head.append(to)
            self._left.append(room)
            self._capacity.append(room)
        return number

    def flow(self, edge: int) -> float:
        """What an edge carries after `solve`."""
        return max(0.0, self._left[edge ^ 1])

    def solve(self, source: Hashable, sink: Hashable) -> float:
        """The value of a maximum flow. Flows below a billionth of the largest finite capacity
        count as none, so that rounding cannot keep it busy."""
        start, end = self.vertex(source), self.vertex(sink)
        finite = [room for room in self._capacity if room < inf]
        least = 1e-12 * max(finite, default=1.0)
        total = 0.0
        while (levels := self._levels(start, end, least)) is not None:
            total += self._blocking(start, end, levels, least)
        return total

    def _levels(self, start: int, end: int, least: float) -> list[int] | None:
        levels = [-1] * len(self._edges)
        levels[start] = 0
        waiting = deque([start])
        while waiting:
            at = waiting.popleft()
            for edge in self._edges[at]:
                to = self._head[edge]
                if levels[to] < 0 and self._left[edge] > least:
                    levels[to] = levels[at] + 1
                    waiting.append(to)
        return levels if levels[end] >= 0 else None

    def _blocking(self, start: int, end: int, levels: list[int], least: float) -> float:
        following = [0] * len(self._edges)
        total, path, at = 0.0, list[int](), start
        while True:
            if at == end:
                pushed = min(self._left[edge] for edge in path)
                for edge in path:
                    self._left[edge] -= pushed
                    self._left[edge ^ 1] += pushed
                total += pushed
                path, at = [], start
                continue
            further = self._next(at, following, levels, least)
            if further is not None:
                path.append(further)
                at = self._head[further]
            elif path:
                at = self._head[path.pop() ^ 1]
                following[at] += 1
            else:
                return total

    def _next(self, at: int, following: list[int], levels: list[int], least: float) -> int | None:
        edges = self._edges[at]
        while following[at] < len(edges):
            edge = edges[following[at]]
            if self._left[edge] > least and levels[self._head[edge]] == levels[at] + 1:
                return edge
            following[at] += 1
        return None


@dataclass(frozen=True)
class LayoutFlow:
    """tokens_per_s: through the whole layout. links: of each (from, to) that carries some, how
    many; from may be "source", to may be "sink"."""

    tokens_per_s: float
    links: dict[tuple[str, str], float]


def meets(problem: SpanProblem, first: Node, second: Node) -> bool:
    """Whether `second` can go on where `first` ends."""
    if problem.partial:
        return second.start <= first.stop < second.stop
    return first.stop == second.start


def layout_flow(problem: SpanProblem, layout: Layout) -> LayoutFlow:
    """The maximum flow of tokens: nodes and links as capacities, an edge from one node to another
    where the second can go on after the first (Helix, section 4)."""
    network, links = FlowNetwork(), dict[tuple[str, str], int]()
    names = node_names(layout.nodes)
    for name, node in zip(names, layout.nodes, strict=True):
        network.add((name, "in"), (name, "out"), rate(problem, node))
        if node.start == 0:
            links[SOURCE, name] = network.add(SOURCE, (name, "in"), problem.links.enter)
        if node.stop == problem.layers:
            links[name, SINK] = network.add((name, "out"), SINK, problem.links.leave)
        for other_name, other in zip(names, layout.nodes, strict=True):
            if other is not node and meets(problem, node, other):
                room = problem.links.rate(node.machine, other.machine)
                if room > 0:
                    links[name, other_name] = network.add((name, "out"), (other_name, "in"), room)
    total = network.solve(SOURCE, SINK)
    carried = {ends: network.flow(edge) for ends, edge in links.items()}
    return LayoutFlow(total, {ends: flow for ends, flow in carried.items() if flow > 0})
