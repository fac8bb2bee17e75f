"""Redundant computation in a pipeline's idle time (Bamboo, NSDI 23).

Every stage also holds the layers and optimizer state of the next one (the last stage those of the
first) and, while it waits for its neighbours, runs them forward on what it hands on: eager forward
redundancy. When the next stage's worker is lost, it goes on as both: the backward passes that went
with the worker are done again from gradients that the stage behind sends once more (lazy backward
redundancy), and the step ends with the bits it would have had. No checkpoint is read.

Afterwards copies that went with the lost worker are made anew at the start of the next step
(`mend`); until then that part is without cover. Losing two neighbours at once is `LayersLost`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.parallel.pipeline import StageRun
from train.parallel.pipeline_channels import Channels
from train.parallel.pipeline_layout import Chain, Layout, Place, Span, Stage, survivors
from train.parallel.pipeline_part import Part
from train.parallel.pipeline_trainer import LayersLost, Move, PipelineTrainer, Training
from train.world import World

Cover = dict[int, frozenset[int]]
"""By rank, which of its layers the stage before it holds, up to date."""


class Takeover(NamedTuple):
    """What becomes of a layout: in new ranks, with what is covered and who needs a copy first."""

    layout: Layout
    cover: Cover
    moves: list[Move]


def guard(chain: Chain, position: int) -> Stage:
    """The stage that covers one: the one before it, in a ring."""
    return chain.stages[position - 1]


def ward(chain: Chain, position: int) -> Stage:
    """The stage that this one covers."""
    return chain.stages[(position + 1) % len(chain.stages)]


def full_cover(layout: Layout) -> Cover:
    """Everything covered, but in chains of one stage, which have nobody to cover them."""
    return {
        stage.rank: frozenset(stage.layers if len(chain.stages) > 1 else ())
        for chain in layout.chains
        for stage in chain.stages
    }


def take_over(layout: Layout, cover: Cover, lost: frozenset[int], size: int) -> Takeover:
    """The layout after ranks `lost` of `size` are gone; each survivor can work it out. A lost stage
    joins the one before it; the first one joins the second, which gets its layers from the last.
    LayersLost where a lost stage's guard is lost too, or had no copy yet."""
    ranks = survivors(size, lost)
    gone = [n for chain in layout.chains for n in _unguarded(chain, cover, lost)]
    if gone:
        raise LayersLost(sorted(set(gone)), f"{_who(layout, lost)} with the copies of them")
    chains = [Chain(_joined(c, lost), c.first, c.samples) for c in layout.chains]
    valid = _copies(layout, cover)
    new_cover: Cover = {}
    moves: list[Move] = []
    for old, new in zip(layout.chains, chains, strict=True):
        for p, stage in enumerate(new.stages):
            guardian = guard(new, p)
            held = valid[guardian.rank] - set(guardian.layers)
            new_cover[ranks[stage.rank]] = held & frozenset(stage.layers)
            lacking = [n for n in stage.layers if n not in valid[stage.rank]]
            moves += [Move(n, ranks[guard(old, 0).rank], ranks[stage.rank]) for n in lacking]
    changed = Layout(tuple(chains), layout.layers, layout.micro_samples)
    return Takeover(changed.renumbered(ranks), new_cover, moves)


def _unguarded(chain: Chain, cover: Cover, lost: frozenset[int]) -> list[int]:
    gone: list[int] = []
    for p, stage in enumerate(chain.stages):
        if stage.rank in lost:
            alone = guard(chain, p).rank in lost
            gone += [n for n in stage.layers if alone or n not in cover[stage.rank]]
    return gone


def _who(layout: Layout, lost: frozenset[int]) -> str:
    places = [(rank, layout.place(rank)) for rank in sorted(lost)]
    stages = [f"stage {place.position} (rank {rank})" for rank, place in places if place]
    return f"{' and '.join(stages)} went"


def _joined(chain: Chain, lost: frozenset[int]) -> tuple[Stage, ...]:
    """The stages that are left, with the spans of those that are not."""
    made: list[Stage] = []
    waiting: tuple[Span, ...] = ()  # of a lost first stage
    for stage in chain.stages:
        if stage.rank not in lost:
            made.append(Stage(stage.rank, waiting + stage.spans))
            waiting = ()
        elif made:
            made[-1] = Stage(made[-1].rank, made[-1].spans + stage.spans)
        else:
            waiting = stage.spans
    return tuple(made)


def _copies(layout: Layout, cover: Cover) -> dict[int, frozenset[int]]:
    """By rank, every layer whose state it has: its own and what it covers."""
    return {
        stage.rank: frozenset(stage.layers) | cover[ward(chain, p).rank]
        for chain in layout.chains
        for p, stage in enumerate(chain.stages)
    }


class BambooTrainer(PipelineTrainer):
    """A worker with its neighbour's layers. sent_copies_bytes: gradients sent so that copies stay
    up to date, a stage's weights in each step."""

    def __init__(self, training: Training, layout: Layout, rank: int) -> None:
        super().__init__(training, layout, rank)
        self.cover = full_cover(layout)
        self.sent_copies_bytes = 0
        place = layout.place(rank)
        if place is not None:
            covered = self._covered(place)
            self.held.build(covered - set(self.held.modules))

    def step(self, world: World) -> float:
        """See `PipelineTrainer.step`; makes missing copies first."""
        if self._run is None:
            self.mend(world)
        return super().step(world)

    def mend(self, world: World) -> None:
        """Copies to every stage's guard what it lacks; forgets copies that are of no use."""
        moves = []
        for chain in self.layout.chains:
            for p, stage in enumerate(chain.stages):
                guardian = guard(chain, p)
                if guardian.rank != stage.rank:
                    lacking = (n for n in stage.layers if n not in self.cover[stage.rank])
                    moves += [Move(n, stage.rank, guardian.rank) for n in lacking]
        if moves:
            self.held.drop(set(self.held.modules) - self._needed(world.rank))
            self.transfer(world, moves)
            self.cover = full_cover(self.layout)

    def changed(self, world: World, lost: frozenset[int]) -> None:
        """Goes on in a new world without ranks `lost` of the one before, whose other ranks closed
        up in order. The next `step` ends the step that was cut short, if it was."""
        self.agree(world)
        before = self.layout
        taken = take_over(before, self.cover, lost, world.size + len(lost))
        self.transfer(world, taken.moves)
        self.layout, self.cover = taken.layout, taken.cover
        place = self.layout.place(world.rank)
        begun = torch.tensor([float(self._run is not None)], dtype=torch.float64)
        if not any(bool(row) for row in world.all_gather(begun)):
            return
        if place is not None:
            self._run = self._resumed(place, self._run)
        self._catch_up(world, place)

    def _covered(self, place: Place) -> frozenset[int]:
        return self.cover[ward(self.layout.chains[place.chain], place.position).rank]

    def _needed(self, rank: int) -> set[int]:
        place = self.layout.place(rank)
        if place is None:
            return set()
        return set(self.layout.stage(place).layers) | self._covered(place)

    def _begin(self, place: Place) -> StageRun:
        parts = self._parts(place, keep=True)
        return StageRun(parts, self._work(place), self._shadow(place), self.training.observe)

    def _shadow(self, place: Place) -> Part | None:
        """The part to run redundantly: the next stage, if all of it is here."""
        chain = self.layout.chains[place.chain]
        stage = ward(chain, place.position)
        if len(chain.stages) == 1 or self._covered(place) != frozenset(stage.layers):
            return None
        return self._part(Span(stage.layers.start, stage.layers.stop))

    def _part(self, span: Span) -> Part:
        modules = [self.held.modules[n] for n in range(*span)]
        return Part(self.training.model, modules, span, keep=True)

    def _resumed(self, place: Place, run: StageRun | None) -> StageRun:
        """The run of this stage's new layers that keeps what of them was computed here."""
        if run is None:
            return self._begin(place)
        layers = self.layout.stage(place).layers
        parts = list(run.parts)
        shadow = run.shadow
        if layers.start < parts[0].span.start:  # the first stage's, whose forward passes are gone
            parts.insert(0, self._part(Span(layers.start, parts[0].span.start)))
        if layers.stop > parts[-1].span.stop:
            assert shadow is not None
            parts.append(shadow)
            shadow = None
        chain = self.layout.chains[place.chain]
        following = ward(chain, place.position).layers
        if shadow is not None and range(*shadow.span) != following:
            shadow = None
        return StageRun(parts, self._work(place), shadow, self.training.observe)

    def _catch_up(self, world: World, place: Place | None) -> None:
        """Tells neighbours what this stage has, so that they send what it lacks."""
        run = self._run
        mine = [float(run.parts[0].forwards), float(run.parts[-1].backwards)] if run else [0.0, 0.0]
        rows = world.all_gather(torch.tensor(mine, dtype=torch.float64))
        if run is None or place is None:
            return
        work = run.work
        run.sent_on = 0 if work.after is None else int(rows[work.after][0])
        run.sent_back = 0 if work.before is None else int(rows[work.before][1])

    def _gradients(self, world: World, place: Place, channels: Channels) -> dict[int, Tensor]:
        """The stage's, and those of the layers it covers."""
        summed = super()._gradients(world, place, channels)
        chain = self.layout.chains[place.chain]
        guardian = guard(chain, place.position).rank
        before = channels.sent_bytes
        for layer in sorted(self.cover[world.rank]):
            channels.send(summed[layer], guardian)
        self.sent_copies_bytes += channels.sent_bytes - before
        following = ward(chain, place.position).rank
        for layer in sorted(self._covered(place)):
            gradient = torch.empty(self.held.numel(layer), dtype=self.training.model.dtype)
            world.recv(gradient, following)
            summed[layer] = gradient
        channels.flush()
        return summed
