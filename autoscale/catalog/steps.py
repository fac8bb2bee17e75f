"""Profiles from measured times of steps: the tables that `sanderling bench profile` writes, and the
measurements that come with Splitwise.

A step's time is that of its prompt tokens plus that of its decodes, each read off its own curve.
"""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.profile import NOISE, Point, TableError, curve, interpolate
from autoscale.catalog.rates import shape_rate
from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape
from cluster.reading import Strict, read_toml, validated


class ReplicaKey(NamedTuple):
    """What was measured: one replica of `tensor` accelerators of a kind."""

    kind: str
    tensor: int


class StepCurves(NamedTuple):
    """prefill: seconds by prompt tokens. decode: by context tokens, seconds by sequences.
    kv_tokens: room that the measured replica had; None where it was not told."""

    prefill: Sequence[Point]
    decode: Sequence[tuple[float, Sequence[Point]]]
    kv_tokens: int | None = None

    def decode_s(self, sequences: float, context: float) -> float:
        """Linear between contexts; outside of them, along the line through the nearest two, but
        never below the shortest context's."""
        contexts = [at for at, _ in self.decode]
        times = [interpolate(points, sequences) for _, points in self.decode]
        if len(times) == 1:
            return times[0]
        place = next((n for n, at in enumerate(contexts[1:-1], 1) if context <= at), -1)
        place = len(times) - 1 if place < 0 else place
        low, high = contexts[place - 1], contexts[place]
        slope = max(0.0, (times[place] - times[place - 1]) / (high - low))
        return max(times[0], times[place - 1] + slope * (context - low))


@dataclass(frozen=True)
class StepTable:
    """A profile from measured steps. room: memory of shapes whose table does not tell it."""

    curves: Mapping[ReplicaKey, StepCurves]
    source: str
    room: MemoryRoom | None = None

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        """As `StepTimes`. ValueError for a kind that was not measured at all."""
        self._refuse_unknown(shape.kind)
        key = ReplicaKey(shape.kind, shape.tensor)
        if key not in self.curves or shape.pipeline != 1:
            return float("inf")
        curves = self.curves[key]
        prefill_s = interpolate(curves.prefill, prefill_tokens) if prefill_tokens else 0.0
        if not decode_sequences:
            return prefill_s
        return prefill_s + curves.decode_s(decode_sequences, context_tokens)

    def _refuse_unknown(self, kind: str) -> None:
        if all(known.kind != kind for known in self.curves):
            kinds = ", ".join(sorted({known.kind for known in self.curves}))
            raise ValueError(f"{self.source}: no kind {kind!r} was measured; there are {kinds}")

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """Of the table, or counted. ValueError for a kind that was not measured at all."""
        self._refuse_unknown(shape.kind)
        curves = self.curves.get(ReplicaKey(shape.kind, shape.tensor))
        if curves is None or shape.pipeline != 1:
            return 0
        if curves.kv_tokens is not None:
            return curves.kv_tokens
        return self.room.kv_tokens(shape) if self.room else 0

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        return shape_rate(self, shape, bucket, slo)


class PrefillRow(Strict):
    """One prompt, or a batch of them, of so many tokens."""

    tokens: int = Field(ge=1)
    seconds: float


class DecodeRow(Strict):
    """One step of so many sequences, each with so much context."""

    sequences: int = Field(ge=1)
    context_tokens: int = Field(ge=0)
    seconds: float


class ReplicaTable(Strict):
    """All rows of one replica."""

    kind: str = Field(min_length=1)
    tensor: int = Field(default=1, ge=1)
    kv_tokens: int | None = Field(default=None, ge=1)
    prefill: tuple[PrefillRow, ...] = Field(min_length=1)
    decode: tuple[DecodeRow, ...] = Field(min_length=1)

    def curves(self, where: str, noise: float) -> StepCurves:
        prefill = [
            Point(row.tokens, row.seconds, f"{where}, prefill {n}")
            for n, row in enumerate(self.prefill, 1)
        ]
        by_context: dict[float, list[Point]] = {}
        for n, row in enumerate(self.decode, 1):
            point = Point(row.sequences, row.seconds, f"{where}, decode {n}")
            by_context.setdefault(row.context_tokens, []).append(point)
        return step_curves(prefill, by_context, noise, self.kv_tokens)


class ProfileFile(Strict):
    """What `sanderling bench profile` writes. source: "measured on …"."""

    source: str = Field(min_length=1)
    model: str = Field(min_length=1)
    replica: tuple[ReplicaTable, ...] = Field(min_length=1)


def step_curves(
    prefill: Iterable[Point],
    decode: Mapping[float, Iterable[Point]],
    noise: float,
    kv_tokens: int | None = None,
) -> StepCurves:
    """Checked: TableError where more tokens, sequences or context take less time."""
    ordered = [(at, curve(list(points), noise)) for at, points in sorted(decode.items())]
    for (_, shorter), (at, longer) in zip(ordered, ordered[1:], strict=False):
        known = {point.x: point for point in shorter}
        for point in longer:
            before = known.get(point.x)
            if before and point.y < (1 - noise) * before.y:
                raise TableError(
                    f"{point.row}: {point.y:g} at a context of {at:g} is less than {before.y:g} at "
                    f"a shorter one ({before.row}) by more than the noise of {noise:.0%}"
                )
    return StepCurves(curve(list(prefill), noise), ordered, kv_tokens)


def read_profile(path: Path, noise: float = NOISE) -> StepTable:
    """A measured profile of our own format. ValueError names the key, TableError the row."""
    file = validated(ProfileFile, read_toml(path), str(path))
    curves: dict[ReplicaKey, StepCurves] = {}
    for number, table in enumerate(file.replica, 1):
        key = ReplicaKey(table.kind, table.tensor)
        where = f"{path}: replica {number}"
        if key in curves:
            raise TableError(f"{where}: {key.kind} with tensor = {key.tensor} is there twice")
        curves[key] = table.curves(where, noise)
    return StepTable(curves, f"{file.source} (model {file.model})")


SPLITWISE_KINDS = {"a100-80gb": "a100-80g", "h100-80gb": "h100"}
SPLITWISE_OUTPUT_TOKENS = 128  # the answer length that most rows share
MS = 1e-3


def read_splitwise(path: Path, model: str, room: MemoryRoom, noise: float = NOISE) -> StepTable:
    """Splitwise's perf_model.csv: medians of its repetitions. Batches were measured at one prompt
    length; other contexts add to each sequence what they add to a single one."""
    rows = [row for row in _read_csv(path) if row["model"] == model]
    if not rows:
        raise ValueError(f"{path}: no model {model!r}")
    keys = {
        (row["hardware"], int(row["tensor_parallel"]))
        for row in rows
        if row["hardware"] in SPLITWISE_KINDS
    }
    curves = {
        ReplicaKey(SPLITWISE_KINDS[hardware], tensor): _splitwise_curves(
            [r for r in rows if (r["hardware"], int(r["tensor_parallel"])) == (hardware, tensor)],
            f"{path}: {model} on {tensor} {hardware}",
            noise,
        )
        for hardware, tensor in sorted(keys)
    }
    return StepTable(curves, f"table of Splitwise's measurements ({path.name}, {model})", room)


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _splitwise_curves(rows: Sequence[Mapping[str, str]], where: str, noise: float) -> StepCurves:
    short = [row for row in rows if int(row["token_size"]) == SPLITWISE_OUTPUT_TOKENS]
    single = [row for row in short if row["batch_size"] == "1"]
    prompts = _medians(single, "prompt_size", "prompt_time", where)
    by_prompt = {point.x: point.y for point in _medians(single, "prompt_size", "token_time", where)}
    lengths = {int(row["prompt_size"]) for row in short if row["batch_size"] != "1"}
    if len(lengths) != 1:
        raise TableError(f"{where}: batches were measured at prompts of {sorted(lengths)} tokens")
    base = lengths.pop()
    at_base = [row for row in short if int(row["prompt_size"]) == base]
    batches = _medians(at_base, "batch_size", "token_time", where)
    # Repetitions differ by more than a context adds; a context never takes time away.
    longest, decode = by_prompt[base], {}
    for prompt in sorted(size for size in by_prompt if size >= base):
        longest = max(longest, by_prompt[prompt])
        extra = longest - by_prompt[base]
        context = prompt + SPLITWISE_OUTPUT_TOKENS / 2
        decode[context] = [point._replace(y=point.y + point.x * extra) for point in batches]
    return step_curves(prompts, decode, noise)


def _medians(rows: Iterable[Mapping[str, str]], x: str, y: str, where: str) -> list[Point]:
    groups: dict[float, list[float]] = {}
    for row in rows:
        groups.setdefault(float(row[x]), []).append(float(row[y]) * MS)
    return [
        Point(at, statistics.median(seconds), f"{where}, {x} {at:g}")
        for at, seconds in sorted(groups.items())
    ]
