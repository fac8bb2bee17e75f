"""Layers of one model spread over unlike nodes: what a node can be, how nodes are linked, and what
a layout is (Helix, ASPLOS 25; a tensor degree per stage as in HexGen, ICML 24)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite

from autoscale.placement.plan import LayerSpan


@dataclass(frozen=True)
class Pool:
    """`machines` alike, each of `accelerators`. usd_per_h: of one machine. names: of the machines,
    in order; by default "pool-0", "pool-1", …"""

    name: str
    machines: int
    accelerators: int = 1
    usd_per_h: float = 0.0
    names: tuple[str, ...] = ()

    @property
    def total_accelerators(self) -> int:
        return self.machines * self.accelerators

    def machine(self, index: int) -> str:
        return self.names[index] if self.names else f"{self.name}-{index}"


@dataclass(frozen=True)
class Stage:
    """One way to use a pool: `tensor` of a machine's accelerators share l consecutive layers and
    pass tokens_per_s[l - 1] tokens a second, for as many l as their memory holds."""

    pool: str
    tokens_per_s: tuple[float, ...]
    tensor: int = 1

    @property
    def most_layers(self) -> int:
        return len(self.tokens_per_s)


@dataclass(frozen=True)
class Links:
    """Most tokens per second from the front to a node, from a node back to it, and between two
    machines; `pairs` holds those between two machines that differ, 0.0 where there is no link."""

    enter: float = inf
    leave: float = inf
    between: float = inf
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def rate(self, first: str, second: str) -> float:
        """Tokens per second from one machine to another; without limit within one."""
        return inf if first == second else self.pairs.get((first, second), self.between)


@dataclass(frozen=True)
class SpanProblem:
    """A model of `layers` layers, pools of machines and the stages that they can be.

    partial: a request may enter a node in the middle of its span, where the sender's span overlaps
    it (Helix calls it partial inference). Without, spans have to meet end to end.
    """

    layers: int
    pools: tuple[Pool, ...]
    stages: tuple[Stage, ...]
    links: Links = Links()
    partial: bool = False

    def __post_init__(self) -> None:
        for sentence in _wrong(self):
            raise ValueError(sentence)

    def pool_of(self, stage: int) -> int:
        """The place in `pools` of the stage at that place in `stages`."""
        return [pool.name for pool in self.pools].index(self.stages[stage].pool)

    @property
    def free_links(self) -> bool:
        """No link can bind: each carries more than the faster of any two nodes."""
        fastest = max(max(stage.tokens_per_s) for stage in self.stages)
        slowest_link = min(
            self.links.enter, self.links.leave, self.links.between, *self.links.pairs.values(), inf
        )
        return slowest_link >= fastest


@dataclass(frozen=True)
class Node:
    """A stage (its place in SpanProblem.stages) on a machine, holding layers start..stop-1."""

    machine: str
    stage: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Which layers lie where."""

    nodes: tuple[Node, ...]

    def spans(self) -> tuple[LayerSpan, ...]:
        """As a plan holds them."""
        names = node_names(self.nodes)
        return tuple(
            LayerSpan(name, node.start, node.stop)
            for name, node in zip(names, self.nodes, strict=True)
        )


def node_names(nodes: Sequence[Node]) -> list[str]:
    """One name each: the machine's, with a number behind where it holds several nodes."""
    many = {node.machine for n, node in enumerate(nodes) if node.machine in _before(nodes, n)}
    count: dict[str, int] = {}
    names = []
    for node in nodes:
        number = count[node.machine] = count.get(node.machine, -1) + 1
        names.append(f"{node.machine}.{number}" if node.machine in many else node.machine)
    return names


def _before(nodes: Sequence[Node], n: int) -> set[str]:
    return {node.machine for node in nodes[:n]}


def rate(problem: SpanProblem, node: Node) -> float:
    """Tokens per second that pass through a node."""
    return problem.stages[node.stage].tokens_per_s[node.stop - node.start - 1]


def check_layout(problem: SpanProblem, layout: Layout) -> None:
    """ValueError with what is wrong: layers that do not exist or do not fit, a machine used
    twice."""
    used: dict[str, int] = {}
    for node in layout.nodes:
        stage = problem.stages[node.stage]
        held = node.stop - node.start
        if node.start < 0 or node.stop > problem.layers or held < 1:
            raise ValueError(f"{node.machine}: no layers {node.start} to {node.stop - 1}")
        if held > stage.most_layers:
            raise ValueError(f"{node.machine}: {held} layers where {stage.most_layers} fit")
        used[node.machine] = used.get(node.machine, 0) + stage.tensor
    room = {
        pool.machine(index): pool.accelerators
        for pool in problem.pools
        for index in range(pool.machines)
    }
    for machine, accelerators in used.items():
        if accelerators > room.get(machine, 0):
            raise ValueError(f"{machine}: {accelerators} accelerators of {room.get(machine, 0)}")


def on_machines(problem: SpanProblem, placed: Sequence[tuple[int, int, int]]) -> Layout:
    """Stages as (place in `stages`, start, stop) put on machines of their pools, largest tensor
    degree first. ValueError where they do not fit; they do as soon as their sum does, for each
    degree of a pool divides the next."""
    free = {
        pool.name: {pool.machine(n): pool.accelerators for n in range(pool.machines)}
        for pool in problem.pools
    }
    nodes = []
    by_size = sorted(placed, key=lambda item: -problem.stages[item[0]].tensor)
    for stage, start, stop in by_size:
        tensor = problem.stages[stage].tensor
        left = free[problem.stages[stage].pool]
        machine = next((name for name, room in left.items() if room >= tensor), None)
        if machine is None:
            raise ValueError(f"no machine of {problem.stages[stage].pool} has {tensor} left")
        left[machine] -= tensor
        nodes.append(Node(machine, stage, start, stop))
    return Layout(tuple(sorted(nodes, key=lambda node: (node.start, node.stop, node.machine))))


def _wrong(problem: SpanProblem) -> Iterator[str]:
    if problem.layers < 1:
        yield f"layers = {problem.layers}: at least one is needed"
    if not problem.stages:
        yield "stages: at least one is needed"
    machines = {pool.name: pool for pool in problem.pools}
    if len(machines) < len(problem.pools):
        yield "pools: two have the same name"
    for pool in problem.pools:
        if pool.names and len(pool.names) != pool.machines:
            yield f"pool {pool.name}: {len(pool.names)} names for {pool.machines} machines"
    for stage in problem.stages:
        if stage.pool not in machines:
            yield f"stage of pool {stage.pool!r}: known are {', '.join(machines)}"
            return
        if not 1 <= stage.tensor <= machines[stage.pool].accelerators:
            yield f"tensor = {stage.tensor}: {stage.pool} has {machines[stage.pool].accelerators}"
        if not stage.tokens_per_s or not all(isfinite(r) and r > 0 for r in stage.tokens_per_s):
            yield f"tokens_per_s of {stage.pool}: a positive rate for each number of layers"
    for pool in problem.pools:
        degrees = sorted({s.tensor for s in problem.stages if s.pool == pool.name})
        chain = [*degrees, pool.accelerators]
        if any(larger % smaller for smaller, larger in pairwise(chain)):
            yield f"tensor degrees of {pool.name}, {chain}: each has to divide the next"
