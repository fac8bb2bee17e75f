"""Layers of a model in training over unlike accelerators: the order of devices and the cut that
make a pipeline fastest, within memory and within a bound on staleness (HetPipe, ATC 20; the search
over pipelines as in AMP, NeurIPS 22)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from autoscale.placement.planner import InfeasibleError


@dataclass(frozen=True)
class Device:
    """`count` accelerators alike. layer_s: forward and backward of one minibatch, of each layer."""

    name: str
    layer_s: tuple[float, ...]
    memory_bytes: float
    count: int = 1


@dataclass(frozen=True)
class LayerBytes:
    """Of each layer: its weights with gradients and optimizer state, the activations that one
    minibatch keeps until its backward pass, and seconds to send its output on."""

    state_bytes: tuple[float, ...]
    kept_bytes: tuple[float, ...]
    send_s: tuple[float, ...]


@dataclass(frozen=True)
class PipelineStage:
    """Layers start..stop-1 on one device; seconds of a minibatch, sending included."""

    device: str
    start: int
    stop: int
    seconds: float


@dataclass(frozen=True)
class TrainingPipeline:
    """Stages in order. in_flight: minibatches at once; minibatches_per_s: the rate at which they
    leave, limited by the slowest stage, or by too few in flight to fill all stages."""

    stages: tuple[PipelineStage, ...]
    in_flight: int

    @property
    def slowest_s(self) -> float:
        return max(stage.seconds for stage in self.stages)

    @property
    def minibatches_per_s(self) -> float:
        through_s = sum(stage.seconds for stage in self.stages)
        return min(1.0 / self.slowest_s, self.in_flight / through_s)


def global_staleness(in_flight: int, clock_distance: int) -> int:
    """Updates that a minibatch's weights may lack (HetPipe): with s = in_flight - 1 inside a
    pipeline and pipelines at most `clock_distance` waves apart, (D + 1)(s + 1) + s - 1."""
    inside = in_flight - 1
    return (clock_distance + 1) * (inside + 1) + inside - 1


def most_in_flight(clock_distance: int, staleness_bound: int) -> int:
    """The most minibatches at once within a bound on global staleness. ValueError where even one
    is too many."""
    count = 0
    while global_staleness(count + 1, clock_distance) <= staleness_bound:
        count += 1
    if count == 0:
        raise ValueError(
            f"staleness_bound = {staleness_bound}: clock_distance = {clock_distance} alone gives "
            f"{global_staleness(1, clock_distance)}"
        )
    return count


def fastest_pipeline(
    devices: Sequence[Device], layers: LayerBytes, *, most_in_flight: int
) -> TrainingPipeline:
    """The pipeline of the highest rate over any of the devices, in any order, with up to
    most_in_flight minibatches at once. InfeasibleError where the model fits nowhere.

    For each number in flight and of stages, dynamic programming over (devices used, layers done)
    finds the cut whose slowest stage is fastest, and, where the stages are more than the
    minibatches in flight, every trade of it against the time through all stages."""
    best: TrainingPipeline | None = None
    total = sum(device.count for device in devices)
    for in_flight in range(1, most_in_flight + 1):
        for count in range(1, min(total, len(layers.state_bytes)) + 1):
            for found in _cuts(devices, layers, in_flight, count):
                if best is None or found.minibatches_per_s > best.minibatches_per_s * (1 + 1e-12):
                    best = found
    if best is None:
        raise InfeasibleError("memory: no cut of the layers fits on the devices")
    return best


Used = tuple[int, ...]
# (slowest stage, time through all, stages): what no other way to the same state betters in both.
Partial = tuple[float, float, tuple[PipelineStage, ...]]


def _cuts(
    devices: Sequence[Device], layers: LayerBytes, in_flight: int, count: int
) -> Iterator[TrainingPipeline]:
    none = tuple(0 for _ in devices)
    states: dict[tuple[Used, int], list[Partial]] = {(none, 0): [(0.0, 0.0, ())]}
    for position in range(count):
        kept = min(in_flight, count - position)  # minibatches whose activations a stage keeps
        following: dict[tuple[Used, int], list[Partial]] = {}
        for (used, start), partials in states.items():
            last = len(layers.state_bytes) - (count - position - 1)
            for n, device in enumerate(devices):
                if used[n] == device.count:
                    continue
                now = (*used[:n], used[n] + 1, *used[n + 1 :])
                for stage in _stages(device, layers, start, last, kept):
                    _extend(following.setdefault((now, stage.stop), []), partials, stage)
        states = following
    for (_, done), partials in states.items():
        if done == len(layers.state_bytes):
            yield from (TrainingPipeline(stages, in_flight) for _, _, stages in partials)


def _stages(
    device: Device, layers: LayerBytes, start: int, last: int, kept: int
) -> Iterator[PipelineStage]:
    """Every span from `start` that fits, no further than `last`."""
    seconds = bytes_ = 0.0
    for layer in range(start, last):
        seconds += device.layer_s[layer]
        bytes_ += layers.state_bytes[layer] + kept * layers.kept_bytes[layer]
        if bytes_ > device.memory_bytes:
            return
        end = layer + 1 == len(layers.state_bytes)
        sending = 0.0 if end else layers.send_s[layer]
        yield PipelineStage(device.name, start, layer + 1, seconds + sending)


def _extend(into: list[Partial], partials: Sequence[Partial], stage: PipelineStage) -> None:
    """Add the stage to each partial cut; keep those that none betters in both times."""
    for slowest, through, stages in partials:
        new = (max(slowest, stage.seconds), through + stage.seconds, (*stages, stage))
        if any(old[0] <= new[0] and old[1] <= new[1] for old in into):
            continue
        into[:] = [old for old in into if not (new[0] <= old[0] and new[1] <= old[1])]
        into.append(new)


@dataclass(frozen=True)
class Virtual:
    """Pipelines of unlike devices side by side (HetPipe's virtual workers)."""

    pipelines: tuple[TrainingPipeline, ...]

    @property
    def minibatches_per_s(self) -> float:
        return sum(pipeline.minibatches_per_s for pipeline in self.pipelines)


def fastest_workers(
    devices: Sequence[Device], layers: LayerBytes, *, most_in_flight: int
) -> Virtual:
    """How many virtual workers, and which devices each: the split of all devices into pipelines of
    the highest sum of rates. All splits of the numbers of like devices are tried, so this is for a
    dozen devices, as many as one job of this kind has. InfeasibleError where the model fits
    nowhere."""
    rates: dict[Used, TrainingPipeline | None] = {}

    def alone(part: Used) -> TrainingPipeline | None:
        if part not in rates:
            own = [
                Device(d.name, d.layer_s, d.memory_bytes, n)
                for d, n in zip(devices, part, strict=True)
                if n
            ]
            try:
                rates[part] = fastest_pipeline(own, layers, most_in_flight=most_in_flight)
            except InfeasibleError:
                rates[part] = None
        return rates[part]

    known: dict[Used, tuple[TrainingPipeline, ...]] = {}

    def split(left: Used) -> tuple[TrainingPipeline, ...]:
        """The best pipelines out of what is left."""
        if left in known:
            return known[left]
        best: tuple[TrainingPipeline, ...] = ()
        most = 0.0
        for part in product(*(range(n + 1) for n in left)):
            pipeline = alone(part) if any(part) else None
            if pipeline is not None:
                rest = split(tuple(n - k for n, k in zip(left, part, strict=True)))
                rate = pipeline.minibatches_per_s + sum(p.minibatches_per_s for p in rest)
                if rate > most * (1 + 1e-12):
                    best, most = (pipeline, *rest), rate
        known[left] = best
        return best

    workers = split(tuple(device.count for device in devices))
    if not workers:
        raise InfeasibleError("memory: no cut of the layers fits on the devices")
    return Virtual(workers)
