"""Profiles from other people's fits: DistServe's coefficients of whole steps on A100-80G, and
Helix's times of one layer by node."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.profile import NOISE, Phase, Point, TableError, curve, interpolate
from autoscale.catalog.rates import shape_rate
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape

MS = 1e-3
DISTSERVE_KIND = "a100-80g"
STAGE_MS = 1.0  # that DistServe adds to a prompt for each stage of a pipeline


class Fit(NamedTuple):
    """Milliseconds of one tensor degree. prefill: constant, each token, each token squared (of one
    prompt). decode: constant, each token of context, each sequence; `few` below `many_from`
    sequences, `many` from there on."""

    prefill: tuple[float, float, float]
    few: tuple[float, float, float]
    many: tuple[float, float, float]
    many_from: int


@dataclass(frozen=True)
class DistServeFits:
    """A profile from DistServe's fits of one model, by tensor degree. kv: tokens of room by tensor
    and pipeline degree, as they measured it."""

    fits: Mapping[int, Fit]
    kv: Mapping[tuple[int, int], int]
    source: str

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        """As `StepTimes`; a pipeline divides the time by its stages, as their simulator has it."""
        self._refuse_unknown(shape.kind)
        fit = self.fits.get(shape.tensor)
        if fit is None:
            return math.inf
        total_ms = 0.0
        if prefill_tokens:
            a, b, c = fit.prefill
            prompt_ms = a + b * prefill_tokens + c * prefill_tokens**2
            total_ms += prompt_ms / shape.pipeline + STAGE_MS * shape.pipeline
        if decode_sequences:
            a, b, c = fit.few if decode_sequences < fit.many_from else fit.many
            step_ms = a + b * decode_sequences * context_tokens + c * decode_sequences
            total_ms += step_ms / shape.pipeline
        return total_ms * MS

    def _refuse_unknown(self, kind: str) -> None:
        if kind != DISTSERVE_KIND:
            known = f"only {DISTSERVE_KIND} was measured"
            raise ValueError(f"{self.source}: {known}, no kind {kind!r}")

    def kv_tokens(self, shape: ReplicaShape) -> int:
        self._refuse_unknown(shape.kind)
        return self.kv.get((shape.tensor, shape.pipeline), 0)

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return shape_rate(self, shape, bucket, slo)


def read_distserve(fits: Path, kv: Path, model: str) -> DistServeFits:
    """Their two files. ValueError for an unknown model, TableError for a negative slope."""
    try:
        content = json.loads(fits.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {fits} as DistServe's coefficients: {error}") from None
    if model not in content:
        raise ValueError(f"{fits}: no model {model!r}; there are {', '.join(sorted(content))}")
    by_tensor = {
        int(tensor): _fit(row, f"{fits}: {model}, tensor {tensor}")
        for tensor, row in content[model].items()
    }
    room = {
        (int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
        for row in _csv(kv)
        if row["model"] == model
    }
    return DistServeFits(by_tensor, room, f"table of DistServe's fits ({fits.name}, {model})")


def _fit(row: Mapping[str, Any], where: str) -> Fit:
    parts = {}
    for name in ("prefill", "decoding_smallbs", "decoding_largebs"):
        values = row.get(name)
        if not isinstance(values, list) or len(values) != 3:
            raise TableError(f"{where}: {name} is no list of three coefficients")
        if any(not math.isfinite(value) or value < 0 for value in values):
            raise TableError(f"{where}: {name} = {values} has a negative one")
        parts[name] = (float(values[0]), float(values[1]), float(values[2]))
    threshold = int(row["decoding_large_small_bs_threshold"])
    return Fit(parts["prefill"], parts["decoding_smallbs"], parts["decoding_largebs"], threshold)


@dataclass(frozen=True)
class LayerTable:
    """A profile from times of one layer, by node: `l4x2` is a node of two l4. layers: of the model;
    room: what fits beside them."""

    prefill: Mapping[str, Sequence[Point]]
    decode: Mapping[str, Sequence[Point]]
    layers: int
    source: str
    room: MemoryRoom

    def layer_s(self, kind: str, phase: Phase, tokens: float) -> float:
        """As `LayerTimes`. ValueError for a node that was not measured."""
        table = self.prefill if phase == "prefill" else self.decode
        if kind not in table:
            known = ", ".join(sorted(table))
            raise ValueError(f"{self.source}: no node {kind!r} was measured; there are {known}")
        return interpolate(table[kind], tokens)

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        """As `StepTimes`; the table knows no contexts. Stages work on equal parts at once."""
        node = node_name(shape.kind, shape.tensor)
        if node not in self.prefill and node_name(shape.kind, 1) in self.prefill:
            return math.inf
        stages, total_s = shape.pipeline, 0.0
        if prefill_tokens:
            total_s += self.layers * self.layer_s(node, "prefill", prefill_tokens / stages)
        if decode_sequences:
            total_s += self.layers * self.layer_s(node, "decode", decode_sequences / stages)
        return total_s

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """0 where the tensor degree was not measured; ValueError where the kind was not."""
        if node_name(shape.kind, shape.tensor) not in self.decode:
            self.layer_s(node_name(shape.kind, 1), "decode", 1)
            return 0
        return self.room.kv_tokens(shape)

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return shape_rate(self, shape, bucket, slo)


def node_name(kind: str, accelerators: int) -> str:
    """`l4`, 2 -> `l4x2`."""
    return kind if accelerators == 1 else f"{kind}x{accelerators}"


HELIX_KINDS = {"a100": "a100-40g"}  # theirs -> ours, where they differ


def read_helix(folder: Path, layers: int, room: MemoryRoom, noise: float = NOISE) -> LayerTable:
    """Helix's folder of one model: a folder a node, with prompt and decode times of one layer in
    ms. TableError names the line."""
    nodes = sorted(path for path in folder.glob("*") if path.is_dir())
    if not nodes:
        raise ValueError(f"{folder}: there is no folder of a node")
    read: dict[str, dict[str, Sequence[Point]]] = {"prompt": {}, "decode": {}}
    for node in nodes:
        for phase, table in read.items():
            table[HELIX_KINDS.get(node.name, node.name)] = _layer_curve(
                node / f"{phase}_bs2time.csv", noise
            )
    source = f"table of Helix's layer times ({folder.name})"
    return LayerTable(read["prompt"], read["decode"], layers, source, room)


def _layer_curve(path: Path, noise: float) -> list[Point]:
    """Lines `tokens,ms`. The line of no tokens says nothing about a step."""
    points = []
    for number, cells in enumerate(_lines(path), 1):
        if len(cells) < 2:
            raise TableError(f"{path}: line {number} holds no pair of tokens and ms")
        points.append(Point(float(cells[0]), float(cells[1]) * MS, f"{path}: line {number}"))
    return curve([point for point in points if point.x > 0], noise)


def _lines(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [cells for cells in csv.reader(file) if cells]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _csv(path: Path) -> list[dict[str, str]]:
    head, *lines = _lines(path)
    return [dict(zip(head, cells, strict=True)) for cells in lines]
