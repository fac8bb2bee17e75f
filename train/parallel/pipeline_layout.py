"""Who computes which layers of which samples: chains of stages side by side.

A layout is a plain value that every worker works out for itself, so that nobody has to send it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Layers start..stop-1."""

    start: int
    stop: int


class Micro(NamedTuple):
    """A micro-batch: `samples` samples from `first` on, counted from the step's first sample."""

    first: int
    samples: int


class Place(NamedTuple):
    """Where a rank stands: stage `position` of chain `chain`."""

    chain: int
    position: int


@dataclass(frozen=True)
class Stage:
    """One worker's layers: neighbouring spans, more than one where it took over another's."""

    rank: int
    spans: tuple[Span, ...]

    @property
    def layers(self) -> range:
        return range(self.spans[0].start, self.spans[-1].stop)


@dataclass(frozen=True)
class Chain:
    """A pipeline over all layers, for `samples` samples of every step, from `first` on."""

    stages: tuple[Stage, ...]
    first: int
    samples: int

    def micros(self, micro_samples: int) -> list[Micro]:
        """Its samples in micro-batches; the last one may be smaller."""
        starts = range(self.first, self.first + self.samples, micro_samples)
        end = self.first + self.samples
        return [Micro(start, min(micro_samples, end - start)) for start in starts]


@dataclass(frozen=True)
class Layout:
    """Chains side by side over `layers` layers; a rank in none of them is a spare."""

    chains: tuple[Chain, ...]
    layers: int
    micro_samples: int

    def __post_init__(self) -> None:
        ranks = [stage.rank for chain in self.chains for stage in chain.stages]
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"a rank has two stages: {ranks}")
        first = 0
        for chain in self.chains:
            spans = [span for stage in chain.stages for span in stage.spans]
            ends = [0, *(span.stop for span in spans)]
            if [span.start for span in spans] != ends[:-1] or ends[-1] != self.layers:
                raise ValueError(
                    f"stages must follow each other over {self.layers} layers: {spans}"
                )
            if any(span.start >= span.stop for span in spans):
                raise ValueError(f"a stage needs at least one layer: {spans}")
            if chain.first != first or chain.samples < 1:
                raise ValueError("chains must share the step's samples without gap, one at least")
            first += chain.samples

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return sum(chain.samples for chain in self.chains)

    def place(self, rank: int) -> Place | None:
        """Where a rank stands; None for a spare."""
        for c, chain in enumerate(self.chains):
            for p, stage in enumerate(chain.stages):
                if stage.rank == rank:
                    return Place(c, p)
        return None

    def stage(self, place: Place) -> Stage:
        return self.chains[place.chain].stages[place.position]

    def holders(self, layer: int) -> list[int]:
        """The ranks that compute a layer, by chain."""
        stages = (stage for chain in self.chains for stage in chain.stages)
        return [stage.rank for stage in stages if layer in stage.layers]

    def renumbered(self, ranks: Mapping[int, int]) -> "Layout":
        """The same layout after ranks changed their numbers, by {old: new}."""
        chains = (
            Chain(tuple(Stage(ranks[s.rank], s.spans) for s in c.stages), c.first, c.samples)
            for c in self.chains
        )
        return Layout(tuple(chains), self.layers, self.micro_samples)


def survivors(size: int, lost: frozenset[int]) -> dict[int, int]:
    """New rank of each old one: those that are left close ranks, in their old order."""
    return {old: new for new, old in enumerate(r for r in range(size) if r not in lost)}


def grid(stages: Sequence[Span], chains: int, samples: int, micro_samples: int) -> Layout:
    """`chains` equal pipelines, rank = chain x stages + position, samples shared as evenly as whole
    numbers allow."""
    made, first = [], 0
    for c in range(chains):
        share = samples // chains + (c < samples % chains)
        ranks = range(c * len(stages), (c + 1) * len(stages))
        made.append(
            Chain(tuple(Stage(r, (s,)) for r, s in zip(ranks, stages, strict=True)), first, share)
        )
        first += share
    return Layout(tuple(made), stages[-1].stop, micro_samples)


def cut_spans(layers: int, cuts: Sequence[int]) -> tuple[Span, ...]:
    """Spans over `layers` layers that begin at `cuts`. ValueError where the last one is empty."""
    if cuts[-1] >= layers:
        raise ValueError(
            f"pipeline.cuts = {list(cuts)}: the model has layers 0 to {layers - 1} with its ends, "
            f"so at most {layers - 1} is accepted"
        )
    return tuple(Span(a, b) for a, b in zip(cuts, [*cuts[1:], layers], strict=True))


def even_spans(layers: int, stages: int) -> tuple[Span, ...]:
    """Layers in `stages` spans whose lengths differ by one at most, longer ones first."""
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers make 1 to {layers} stages, not {stages}")
    ends = [0]
    for s in range(stages):
        ends.append(ends[-1] + layers // stages + (s < layers % stages))
    return tuple(Span(a, b) for a, b in zip(ends, ends[1:], strict=False))
