"""What a training step takes with P stages in D chains, from measured costs (after Varuna, EuroSys
22): the 1F1B order of `train.parallel.pipeline` played through, message by message; and the (P, D)
that is fastest for a number of workers.

Of Varuna's schedule only the backward-first part is here, as 1F1B has it: activations are kept, not
computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from train.parallel.pipeline import is_forward_next
from train.parallel.pipeline_layout import Layout, Span, grid
from train.resilience.templates import Cutter, LayerCosts


@dataclass(frozen=True)
class Measured:
    """By layer: seconds forward and backward of one micro-batch, seconds of an update, gradient
    bytes, state bytes, and bytes that leave it. A message of n bytes takes latency_s + n /
    bytes_per_s; memory_bytes of a worker bound the state of its layers."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    gradient_bytes: tuple[float, ...]
    state_bytes: tuple[float, ...]
    boundary_bytes: tuple[float, ...]
    latency_s: float
    bytes_per_s: float
    memory_bytes: float = float("inf")

    def message_s(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s

    @property
    def costs(self) -> LayerCosts:
        """The same for the cut into stages."""
        sends = tuple(2 * self.message_s(size) for size in self.boundary_bytes)
        times = tuple(f + b for f, b in zip(self.forward_s, self.backward_s, strict=True))
        return LayerCosts(times, self.state_bytes, sends, self.memory_bytes)


class StageTimes(NamedTuple):
    """Of one stage: a forward, a backward, and a message on to the next stage or back from it."""

    forward_s: float
    backward_s: float
    send_s: float


class Choice(NamedTuple):
    """A layout and the seconds that its step is expected to take."""

    layout: Layout
    step_s: float


def play(stages: Sequence[StageTimes], micros: int) -> list[float]:
    """When each stage has done its last backward pass. A stage does one thing at a time, in the
    rule's order, each as soon as its input is there; messages of one direction leave one after
    another while it computes on."""
    count = len(stages)
    forwards, backwards = [0] * count, [0] * count
    free = [0.0] * count
    down: list[list[float]] = [[0.0] * micros] + [[] for _ in range(count - 1)]
    up: list[list[float]] = [[] for _ in range(count)]
    while any(done < micros for done in backwards):
        for s, times in enumerate(stages):
            f, b = forwards[s], backwards[s]
            if b == micros:
                continue
            if is_forward_next(f, b, micros, count - s):
                if len(down[s]) > f:
                    free[s] = max(free[s], down[s][f]) + times.forward_s
                    forwards[s] += 1
                    if s + 1 < count:
                        _leave(down[s + 1], free[s], times.send_s)
            elif s == count - 1 or len(up[s]) > b:
                ready = up[s][b] if s < count - 1 else 0.0
                free[s] = max(free[s], ready) + times.backward_s
                backwards[s] += 1
                if s:
                    _leave(up[s - 1], free[s], stages[s - 1].send_s)
    return free


def _leave(arrivals: list[float], now: float, send_s: float) -> None:
    """A message that waits for the one before it on its way."""
    arrivals.append(max(now, arrivals[-1] if arrivals else 0.0) + send_s)


def step_seconds(measured: Measured, layout: Layout) -> float:
    """A whole step: chains side by side, the exchange of gradients, the loss, the update."""
    ends: dict[int, float] = {}
    for chain in layout.chains:
        spans = [Span(s.layers.start, s.layers.stop) for s in chain.stages]
        micros = len(chain.micros(layout.micro_samples))
        done = play([_stage(measured, span) for span in spans], micros)
        ends.update(zip((s.rank for s in chain.stages), done, strict=True))
    finished = []
    for chain in layout.chains:
        for stage in chain.stages:
            peers = {r for n in stage.layers for r in layout.holders(n)}
            size = sum(measured.gradient_bytes[n] for n in stage.layers)
            messages = len(stage.layers) * (len(layout.chains) - 1)
            sending = messages * measured.latency_s
            sending += (len(layout.chains) - 1) * size / measured.bytes_per_s
            finished.append(max(ends[rank] for rank in peers) + sending)
    told = max(finished) + (len(finished) - 1) * measured.latency_s
    return told + max(
        sum(measured.update_s[n] for n in s.layers) for c in layout.chains for s in c.stages
    )


def _stage(measured: Measured, span: Span) -> StageTimes:
    return StageTimes(
        sum(measured.forward_s[slice(*span)]),
        sum(measured.backward_s[slice(*span)]),
        measured.message_s(measured.boundary_bytes[span.stop - 1]),
    )


def choose(
    measured: Measured, workers: int, samples: int, micro_samples: int, least_stages: int = 1
) -> Choice:
    """The fastest (P, D) with P x D <= workers, over all of them with least_stages or more; always
    `samples` a step, so D chains share its micro-batches. ValueError where the model fits in none,
    or there are too few workers."""
    if workers < least_stages:
        raise ValueError(f"{workers} workers: a chain of pipeline.stages = {least_stages} has more")
    cutter = Cutter(measured.costs)
    micros = -(-samples // micro_samples)
    best: Choice | None = None
    for stages in range(least_stages, min(workers, len(measured.forward_s)) + 1):
        for chains in range(1, min(workers // stages, samples) + 1):
            template = cutter.template(stages, -(-micros // chains))
            if template is not None:
                layout = grid(template.spans, chains, samples, micro_samples)
                seconds = step_seconds(measured, layout)
                if best is None or seconds < best.step_s:
                    best = Choice(layout, seconds)
    if best is None:
        raise ValueError(
            f"memory_bytes = {measured.memory_bytes:g}: {workers} workers cannot hold "
            f"{sum(measured.state_bytes):g} bytes of state"
        )
    return best
