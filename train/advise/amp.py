"""Pipelines over unlike devices (AMP, Li et al., NeurIPS 2022): which devices share which stage, in
which order, and where the layers are cut, by dynamic programming over what is used and done.

The model of a step, for stages of `replicas` devices each and m micro-batches: the first goes
through all stages and links, the others follow at the pace of the slowest stage or link, and then
replicas sum the gradient of their layers. A stage is as fast as its slowest device. Within this
model the search is exact; devices that are alike stay a number. Pure arithmetic, no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Group = tuple[int, ...]
"""Devices by kind: entry k of kind k."""


@dataclass(frozen=True)
class LayerTable:
    """By layer, of one micro-batch: seconds forward and backward on a device of speed 1, bytes kept
    for the backward pass, bytes sent on; and bytes of state and of gradient."""

    seconds: tuple[float, ...]
    kept_bytes: tuple[float, ...]
    sent_bytes: tuple[float, ...]
    state_bytes: tuple[float, ...]
    gradient_bytes: tuple[float, ...]


@dataclass(frozen=True)
class DeviceKind:
    """`count` devices of one machine. speed: against the one that layers were timed on; usd_per_h:
    of each."""

    name: str
    count: int
    speed: float
    memory_bytes: float
    link_bytes_per_s: float
    memory_bytes_per_s: float = 1e11
    usd_per_h: float = 0.0


@dataclass(frozen=True)
class Links:
    """Between devices of unlike machines; latency_s: of any message."""

    network_bytes_per_s: float
    latency_s: float = 0.0

    def bytes_per_s(self, kinds: Sequence[DeviceKind], one: Group, other: Group) -> float:
        """The slowest link between devices of two groups, or within one (`one` twice)."""
        ones = {k for k, n in enumerate(one) if n}
        others = {k for k, n in enumerate(other) if n}
        if len(ones | others) > 1:
            return self.network_bytes_per_s
        [kind] = ones
        return kinds[kind].link_bytes_per_s

    def send_s(self, size_bytes: float, bytes_per_s: float) -> float:
        """Of one message."""
        return self.latency_s + size_bytes / bytes_per_s

    def sum_s(self, size_bytes: float, workers: int, bytes_per_s: float) -> float:
        """Of a sum over workers in a ring, which sends 2 (n - 1) parts of an n-th."""
        return 2 * (workers - 1) * self.send_s(size_bytes / workers, bytes_per_s)


class AmpStage(NamedTuple):
    """Layers start..stop-1 on a group; seconds of a micro-batch."""

    group: Group
    start: int
    stop: int
    seconds: float


class Assignment(NamedTuple):
    """stages in order. through_s: a micro-batch through stages and links; slowest_s: the slowest of
    these; sum_s: of gradients over replicas."""

    stages: tuple[AmpStage, ...]
    through_s: float
    slowest_s: float
    sum_s: float

    def step_s(self, micros: int) -> float:
        """Of a step of so many micro-batches in each pipeline, without the update."""
        return self.through_s + (micros - 1) * self.slowest_s + self.sum_s


NOTHING = Assignment((), 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Shape:
    """Stages of so many devices each, and micro-batches of each of the pipelines side by side."""

    stages: int
    replicas: int
    micros: int


def assign(
    layers: LayerTable,
    kinds: Sequence[DeviceKind],
    links: Links,
    shape: Shape,
    cuts: Sequence[int] = (),
) -> Assignment | None:
    """The fastest assignment, of those whose stages begin at `cuts` where these are given; None
    where the layers fit in none. ValueError for a shape that wants more devices or layers than
    there are."""
    devices, count = sum(kind.count for kind in kinds), len(layers.seconds)
    if shape.stages * shape.replicas > devices or shape.stages > count:
        raise ValueError(
            f"{shape.stages} stages of {shape.replicas} devices: there are {devices} devices and "
            f"{count} layers"
        )
    begun: dict[tuple[Group, int, Group], list[Assignment]] = {
        ((0,) * len(kinds), 0, ()): [NOTHING]
    }
    for position in range(shape.stages):
        following: dict[tuple[Group, int, Group], list[Assignment]] = {}
        last = count - (shape.stages - position - 1)
        kept = min(shape.micros, shape.stages - position)
        for (used, start, before), partials in begun.items():
            left = tuple(kind.count - n for kind, n in zip(kinds, used, strict=True))
            for group in groups(left, shape.replicas):
                now = tuple(a + b for a, b in zip(used, group, strict=True))
                for stage in _stages(layers, kinds, group, (start, last), kept):
                    if cuts and stage.stop != (*cuts[1:], count)[position]:
                        continue
                    into = following.setdefault((now, stage.stop, group), [])
                    for partial in partials:
                        _keep(into, _with(partial, stage, layers, kinds, links, before))
        begun = following
    found = [made for (_, done, _), all_ in begun.items() if done == count for made in all_]
    return min(found, key=lambda made: made.step_s(shape.micros), default=None)


def groups(left: Group, size: int) -> Iterator[Group]:
    """Every way to take `size` devices out of what is left."""
    if not left:
        if size == 0:
            yield ()
        return
    for taken in range(min(left[0], size) + 1):
        for rest in groups(left[1:], size - taken):
            yield (taken, *rest)


def _stages(
    layers: LayerTable, kinds: Sequence[DeviceKind], group: Group, span: tuple[int, int], kept: int
) -> Iterator[AmpStage]:
    """Every span from a start on that fits the group, no further than a last layer."""
    members = [kind for kind, n in zip(kinds, group, strict=True) if n]
    speed = min(kind.speed for kind in members)
    room = min(kind.memory_bytes for kind in members)
    seconds = held = 0.0
    for layer in range(*span):
        seconds += layers.seconds[layer] / speed
        held += layers.state_bytes[layer] + kept * layers.kept_bytes[layer]
        if held > room:
            return
        yield AmpStage(group, span[0], layer + 1, seconds)


def _with(
    partial: Assignment,
    stage: AmpStage,
    layers: LayerTable,
    kinds: Sequence[DeviceKind],
    links: Links,
    before: Group,
) -> Assignment:
    """A partial assignment and one more stage, what is sent between them (on, and gradients back)
    and the stage's own sum of gradients included."""
    send_s = 0.0
    if partial.stages:
        between = links.bytes_per_s(kinds, before, stage.group)
        send_s = 2 * links.send_s(layers.sent_bytes[stage.start - 1], between)
    sum_s, replicas = 0.0, sum(stage.group)
    if replicas > 1:
        within = links.bytes_per_s(kinds, stage.group, stage.group)
        size = sum(layers.gradient_bytes[stage.start : stage.stop])
        sum_s = links.sum_s(size, replicas, within)
    return Assignment(
        (*partial.stages, stage),
        partial.through_s + send_s + stage.seconds,
        max(partial.slowest_s, send_s, stage.seconds),
        max(partial.sum_s, sum_s),
    )


def _keep(into: list[Assignment], new: Assignment) -> None:
    """Adds it unless another one is as good in all three times; drops those that it betters."""
    if any(_no_worse(old, new) for old in into):
        return
    into[:] = [old for old in into if not _no_worse(new, old)]
    into.append(new)


def _no_worse(one: Assignment, other: Assignment) -> bool:
    return (
        one.through_s <= other.through_s
        and one.slowest_s <= other.slowest_s
        and one.sum_s <= other.sum_s
    )
