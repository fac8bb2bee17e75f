"""What a profile may know beyond `ThroughputProfile`: times of steps and of layers. A planner or a
check that needs them asks `isinstance(profile, StepTimes)` and refuses by the profile's source."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from autoscale.placement.demand import Bucket, Slo
from autoscale.placement.plan import ReplicaShape
from autoscale.placement.planner import ThroughputProfile

Phase = Literal["prefill", "decode"]

NOISE = 0.1  # repeated measurements of one thing differ by so much


@runtime_checkable
class StepTimes(Protocol):
    """How long one step of a replica takes."""

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        """A step that computes so many prompt tokens and one token each of so many sequences, whose
        contexts are `context_tokens` on average. inf where the shape was not measured."""
        ...


@runtime_checkable
class LayerTimes(Protocol):
    """How long one layer takes on one node of a kind."""

    def layer_s(self, kind: str, phase: Phase, tokens: float) -> float:
        """tokens: of prompts, or sequences that decode. ValueError for an unknown kind."""
        ...


class TableError(ValueError):
    """A measured table that cannot be true; names the row."""


class Point(NamedTuple):
    """One measured figure: at `x` (tokens, sequences), `y` (seconds), from a row of a file."""

    x: float
    y: float
    row: str


def curve(points: Sequence[Point], noise: float = NOISE) -> list[Point]:
    """The points in the order of x. TableError for a negative or absent figure, two figures of one
    x, and one more than `noise` below an earlier one: more work takes no less time."""
    ordered = sorted(points, key=lambda point: point.x)
    if not ordered:
        raise TableError("a table has no rows")
    highest = ordered[0]
    for before, point in zip([None, *ordered], ordered, strict=False):
        if point.x < 0 or not 0 <= point.y < float("inf"):
            raise TableError(f"{point.row}: {point.y:g} at {point.x:g} is negative or no number")
        if before and before.x == point.x:
            raise TableError(f"{point.row}: {point.x:g} is measured twice, as in {before.row}")
        if point.y < (1 - noise) * highest.y:
            raise TableError(
                f"{point.row}: {point.y:g} at {point.x:g} is less than {highest.y:g} at "
                f"{highest.x:g} ({highest.row}) by more than the noise of {noise:.0%}"
            )
        if point.y > highest.y:
            highest = point
    return ordered


def interpolate(points: Sequence[Point], x: float) -> float:
    """Linear between measured points, never falling; beyond the last one along the line from the
    origin or the last two points, whichever rises more steeply: no free work outside a table."""
    if x <= points[0].x:
        return points[0].y
    for low, high in zip(points, points[1:], strict=False):
        if x <= high.x:
            share = (x - low.x) / (high.x - low.x)
            return max(low.y, low.y + share * (high.y - low.y))
    last = points[-1]
    slope = last.y / last.x
    if len(points) > 1:
        slope = max(slope, (last.y - points[-2].y) / (last.x - points[-2].x))
    return last.y + slope * (x - last.x)


@dataclass(frozen=True)
class Remembered:
    """A profile that keeps what it was asked, since plans are made many times over one profile.
    Made by `remembered`. Not for several threads at once."""

    profile: ThroughputProfile
    rates: dict[tuple[ReplicaShape, Bucket, Slo], float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.profile.source

    def requests_per_s(self, shape: ReplicaShape, bucket: Bucket, slo: Slo) -> float:
        key = (shape, bucket, slo)
        if key not in self.rates:
            self.rates[key] = self.profile.requests_per_s(shape, bucket, slo)
        return self.rates[key]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        return self.profile.kv_tokens(shape)


class _Steps(Remembered):
    """Of a profile that knows its steps."""

    def step_s(
        self,
        shape: ReplicaShape,
        prefill_tokens: float,
        decode_sequences: float,
        context_tokens: float,
    ) -> float:
        assert isinstance(self.profile, StepTimes)
        return self.profile.step_s(shape, prefill_tokens, decode_sequences, context_tokens)


class _Layers(_Steps):
    """Of a profile that knows its layers too."""

    def layer_s(self, kind: str, phase: Phase, tokens: float) -> float:
        assert isinstance(self.profile, LayerTimes)
        return self.profile.layer_s(kind, phase, tokens)


def remembered(profile: ThroughputProfile) -> Remembered:
    """The profile with a memory, knowing steps and layers where it does."""
    if isinstance(profile, LayerTimes) and isinstance(profile, StepTimes):
        return _Layers(profile)
    return _Steps(profile) if isinstance(profile, StepTimes) else Remembered(profile)
