"""Helix's published files read for proofs: integer programs in LP format, layouts, layer times."""

import ast
import configparser
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autoscale.placement.spans_layout import Layout, Links, Node, Pool, SpanProblem, Stage

DATA = Path(__file__).parents[3] / "shared" / "data" / "helix"
SINGLE = DATA / "single_cluster_30b"
LAYERS = 60
KIND_MACHINES = {"a100": 4, "l4": 8, "t4": 12}
TERM = re.compile(r"([+-]?)\s*(\d[\d.e+-]*)?\s*([a-z]\w*)")


@dataclass(frozen=True)
class Row:
    """weights · variables, then one of <=, >=, = and a number."""

    weights: Mapping[str, float]
    sense: str
    right: float

    def broken_by(self, values: Mapping[str, float]) -> float:
        """By how much; 0.0 where the row holds."""
        left = sum(weight * values.get(name, 0.0) for name, weight in self.weights.items())
        over, under = max(0.0, left - self.right), max(0.0, self.right - left)
        return {"<=": over, ">=": under, "=": max(over, under)}[self.sense]


@dataclass(frozen=True)
class PublishedProgram:
    """One published integer program: its rows by name, and the objective that Gurobi reached."""

    folder: Path

    @cached_property
    def rows(self) -> dict[str, Row]:
        text = (self.folder / "ilp_model.lp").read_text(encoding="utf-8")
        body = text[text.index("Subject To") + 10 : text.index("Bounds")]
        found = re.findall(r"(\w+):(.*?)(<=|>=|=)\s*(-?[\d.e+]+)", body, re.DOTALL)
        return {name: Row(_terms(left), sense, float(right)) for name, left, sense, right in found}

    @property
    def published(self) -> float:
        text = (self.folder / "ilp_solution.sol").read_text(encoding="utf-8")
        return float(re.findall(r"Objective value = (\S+)", text)[0])

    def rates(self, node: int = 0) -> tuple[float, ...]:
        """Tokens per second of a node by number of layers held."""
        weights = self.rows[f"node_throughput_constraint_{node}"].weights
        held = [name for name in weights if name.startswith(f"hold_{node}_")]
        return tuple(-weights[f"hold_{node}_{n}"] for n in range(1, len(held) + 1))

    @property
    def nodes(self) -> int:
        return sum(name.startswith("node_throughput_constraint_") for name in self.rows)

    def links(self) -> Links:
        def most(name: str) -> float:
            return -min(self.rows[f"edge_flow_constr_{name}"].weights.values())

        return Links(most("source_0"), most("0_sink"), most("0_1"))

    def problem(self, pool: str) -> SpanProblem:
        return SpanProblem(
            LAYERS, (Pool(pool, self.nodes),), (Stage(pool, self.rates()),), self.links()
        )

    def worst_row(self, layout: Layout, flows: Mapping[tuple[str, str], float]) -> float:
        """By how much our layout and flow break any row of the published program."""
        values: dict[str, float] = {}
        number = {node.machine: node.machine.rpartition("-")[2] for node in layout.nodes}
        for node in layout.nodes:
            values[f"start_{number[node.machine]}"] = float(node.start)
            values[f"hold_{number[node.machine]}_{node.stop - node.start}"] = 1.0
        for idle in range(self.nodes):
            if str(idle) not in number.values():
                values |= {f"hold_{idle}_1": 1.0, f"start_{idle}": 0.0}
        for (tail, head), tokens in flows.items():
            name = f"{number.get(tail, tail)}_{number.get(head, head)}"
            values |= {f"flow_{name}": tokens, f"switch_{name}": 1.0}
        _switch_on(values, self.nodes)
        return max(row.broken_by(values) for row in self.rows.values())


def _switch_on(values: dict[str, float], nodes: int) -> None:
    """The program asks that what starts the model is switched to the front, and what ends it to the
    back, whether it carries something or not."""
    for node in range(nodes):
        start = values[f"start_{node}"]
        held = next(int(n.rpartition("_")[2]) for n in values if n.startswith(f"hold_{node}_"))
        values[f"switch_source_{node}"] = float(start == 0)
        values[f"switch_{node}_sink"] = float(start + held == LAYERS)


def _terms(text: str) -> dict[str, float]:
    return {
        name: (-1.0 if sign == "-" else 1.0) * float(number or 1.0)
        for sign, number, name in TERM.findall(text)
    }


def published(kind: str) -> PublishedProgram:
    """a100, l4 or t4."""
    return PublishedProgram(SINGLE / "ilp" / kind)


def mixed_problem(*, partial: bool = False) -> SpanProblem:
    """The 24 nodes of all three kinds, rates as the three programs have them."""
    return SpanProblem(
        LAYERS,
        tuple(Pool(kind, count, names=_names(kind)) for kind, count in KIND_MACHINES.items()),
        tuple(Stage(kind, published(kind).rates()) for kind in KIND_MACHINES),
        published("t4").links(),
        partial,
    )


def _node_kinds() -> list[str]:
    cluster = configparser.ConfigParser()
    cluster.read(DATA / "clusters" / "cluster24.ini")
    return [cluster[f"ComputeNode-{n}"]["type"].lower() for n in range(24)]


def _names(kind: str) -> tuple[str, ...]:
    return tuple(f"node-{n}" for n, each in enumerate(_node_kinds()) if each == kind)


def published_layout(name: str) -> Layout:
    """swarm or petals over the 24 nodes."""
    solution = configparser.ConfigParser()
    solution.read(SINGLE / name / f"{name}_sol.ini")
    offset, kinds = int(solution["Settings"]["offset"]), list(KIND_MACHINES)
    nodes = []
    for key, value in solution["Solution"].items():
        number, held = int(key.rpartition("_")[2]) - offset, ast.literal_eval(value)
        stage = kinds.index(_node_kinds()[number])
        nodes.append(Node(f"node-{number}", stage, held[0], held[-1] + 1))
    return Layout(tuple(nodes))


def times(model: str, kind: str, phase: str) -> list[tuple[float, float]]:
    """(tokens, milliseconds) of one layer; phase: prompt or decode."""
    path = DATA / "layer_times" / model / kind / f"{phase}_bs2time.csv"
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").split()]
    return [(float(tokens), float(ms)) for tokens, ms in rows]
