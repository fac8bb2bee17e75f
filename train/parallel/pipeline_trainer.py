"""A worker of a pipeline over several steps: runs its stage, adds gradients up over chains, updates
its layers, and knows after a change of workers which step everybody is at."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.parallel.pipeline import Act, Batches, StageRun, Work
from train.parallel.pipeline_channels import Channels
from train.parallel.pipeline_layers import AdamW, HeldLayers, LayeredModel
from train.parallel.pipeline_layout import Layout, Micro, Place
from train.parallel.pipeline_part import Part
from train.world import World


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and how. loss_scale: what every micro-batch's loss is multiplied
    by, 1 / (samples x tokens of each) for a mean; observe: told every act of a stage before it;
    clip_norm: largest norm of the whole gradient, 0 for any; before_update: told this norm before
    a step changes the state."""

    model: LayeredModel
    batches: Batches
    update: AdamW
    loss_scale: float
    observe: Callable[[Act], None] = lambda act: None
    clip_norm: float = 0.0
    before_update: Callable[[float], None] = lambda norm: None


class Move(NamedTuple):
    """A layer's state goes from one rank to another."""

    layer: int
    source: int
    to: int


class LayersLost(Exception):
    """No survivor holds these layers: only a checkpoint has them."""

    def __init__(self, layers: list[int], reason: str) -> None:
        self.layers, self.reason = layers, reason
        super().__init__(f"layers {', '.join(map(str, layers))} are lost: {reason}")


class PipelineTrainer:
    """One worker. steps: finished ones; losses: of the steps it took part in, by their number;
    norm: of the last step's gradient over all layers, before clipping. vote: whether this worker
    asks for an end after the next step; asked: whether anybody did in the last one.

    After a `WorldChanged` from `step`, the state is that of the last finished step, possibly one
    behind a peer's: call `agree` in the new world first.
    """

    def __init__(self, training: Training, layout: Layout, rank: int) -> None:
        self.training, self.layout = training, layout
        self.held = HeldLayers(training.model, training.update)
        self.steps = self.samples = 0
        self.losses: dict[int, float] = {}
        self.sent_bytes = 0
        self.norm = 0.0
        self.vote = self.asked = False
        self._run: StageRun | None = None
        self._summed: dict[int, Tensor] | None = None
        place = layout.place(rank)
        if place is not None:
            self.held.build(layout.stage(place).layers)

    def step(self, world: World) -> float:
        """One step of `layout.samples` samples; the loss before the update, alike on all ranks."""
        channels = Channels(world)
        finished = False
        try:
            place = self.layout.place(world.rank)
            self._summed = self._gradients(world, place, channels) if place else {}
            loss = self._share_loss(world)  # whoever gets past this knows that all have gradients
            finished = True
        finally:
            channels.close(broken=not finished)
            self.sent_bytes += channels.sent_bytes
        self._apply(loss)
        return loss

    def agree(self, world: World) -> None:
        """In a new world: if a peer has finished the step under way, so does this one."""
        told = [self.steps, self.losses.get(self.steps, 0.0), self.norm]
        rows = world.all_gather(torch.tensor(told, dtype=torch.float64))
        steps, loss, norm = max((int(row[0]), float(row[1]), float(row[2])) for row in rows)
        if steps > self.steps:
            assert self._summed is not None and steps == self.steps + 1
            self.norm = norm
            self._apply(loss)

    def restart(self) -> None:
        """Forgets the step under way; the next `step` begins it anew."""
        self._run = self._summed = None
        self.held.clear_gradients()

    def move(self, world: World, layout: Layout, moves: list[Move]) -> None:
        """Takes up a new layout: fetches and hands over layers as planned (the same list on every
        rank), forgets what is not needed."""
        self.transfer(world, moves)
        self.restart()
        self.layout = layout
        place = layout.place(world.rank)
        wanted = set(layout.stage(place).layers) if place else set()
        self.held.drop(set(self.held.modules) - wanted)

    def transfer(self, world: World, moves: list[Move]) -> None:
        """Fetches and hands over layers' states."""
        channels, finished = Channels(world), False
        try:
            for move in moves:
                if move.source == world.rank:
                    channels.send(self.held.flat(move.layer), move.to)
            for move in moves:
                if move.to == world.rank:
                    self.held.build([move.layer])
                    numel = 3 * self.held.numel(move.layer)
                    flat = torch.empty(numel, dtype=self.training.model.dtype)
                    world.recv(flat, move.source)
                    self.held.load_flat(move.layer, flat, self.steps)
            channels.flush()
            finished = True
        finally:
            channels.close(broken=not finished)
            self.sent_bytes += channels.sent_bytes

    def _gradients(self, world: World, place: Place, channels: Channels) -> dict[int, Tensor]:
        """Runs what is left of the step; its layers' gradients, summed over chains."""
        if self._run is None:
            self._run = self._begin(place)
        self._run.run(channels)
        summed = exchange(self.held, self.layout, world, channels)
        channels.flush()
        return summed

    def _begin(self, place: Place) -> StageRun:
        """The step's start at a place."""
        return StageRun(self._parts(place), self._work(place), None, self.training.observe)

    def _parts(self, place: Place, *, keep: bool = False) -> list[Part]:
        spans = self.layout.stage(place).spans
        return [
            Part(self.training.model, [self.held.modules[n] for n in range(*span)], span, keep=keep)
            for span in spans
        ]

    def _work(self, place: Place) -> Work:
        chain = self.layout.chains[place.chain]
        stages, p = chain.stages, place.position
        micros = chain.micros(self.layout.micro_samples)
        return Work(
            [Micro(self.samples + first, count) for first, count in micros],
            self.training.batches,
            self.training.loss_scale,
            len(stages) - p,
            stages[p - 1].rank if p else None,
            stages[p + 1].rank if p + 1 < len(stages) else None,
        )

    def _share_loss(self, world: World) -> float:
        """The step's loss, and with it the gradient's norm and who asks to stop. The norm is summed
        layer by layer, so that it does not depend on which layers a stage has."""
        mine = torch.zeros(2 + self.layout.layers, dtype=torch.float64)
        mine[0] = sum(self._run.losses) if self._run else 0.0
        mine[1] = float(self.vote)
        for layer, gradient in (self._summed or {}).items():
            mine[2 + layer] = torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        rows = world.all_gather(mine)
        first = [self.layout.holders(layer)[0] for layer in range(self.layout.layers)]
        self.norm = math.sqrt(sum(float(rows[r][2 + n]) for n, r in enumerate(first)))
        self.asked = any(bool(row[1]) for row in rows)
        return sum(float(rows[chain.stages[-1].rank][0]) for chain in self.layout.chains)

    def _apply(self, loss: float) -> None:
        """Ends the step: every layer that has a gradient is updated."""
        assert self._summed is not None
        limit = self.training.clip_norm
        self.training.before_update(self.norm)
        self.held.clear_gradients()
        for layer, gradient in self._summed.items():
            if limit and self.norm > limit:
                gradient.mul_(limit / (self.norm + 1e-6))
            self.held.apply(layer, gradient, self.steps)
        self._run = self._summed = None
        self.steps += 1
        self.samples += self.layout.samples
        self.losses[self.steps] = loss


def exchange(
    held: HeldLayers, layout: Layout, world: World, channels: Channels
) -> dict[int, Tensor]:
    """The gradients of this rank's layers, each summed over the chains in their order, so that all
    its holders get the same bits. Every holder sends its own to each other one."""
    place = layout.place(world.rank)
    assert place is not None
    own = {layer: held.gradient(layer) for layer in layout.stage(place).layers}
    for layer, gradient in own.items():
        for peer in layout.holders(layer):
            if peer != world.rank and gradient.numel():
                channels.send(gradient, peer)
    return {layer: _sum(gradient, layout.holders(layer), world) for layer, gradient in own.items()}


def _sum(own: Tensor, holders: list[int], world: World) -> Tensor:
    total = torch.zeros_like(own)
    for holder in holders:
        term = own
        if holder != world.rank and own.numel():
            term = torch.empty_like(own)
            world.recv(term, holder)
        total += term
    return total


def plan_moves(held_by: Mapping[int, list[int]], layout: Layout) -> list[Move]:
    """How every rank of a layout gets the layers it lacks from those that hold them, each time from
    the one that has had least to send. Somebody has each."""
    sends: dict[int, int] = {}
    found = []
    for layer in range(layout.layers):
        for to in layout.holders(layer):
            if to not in held_by[layer]:
                source = min(held_by[layer], key=lambda rank: (sends.get(rank, 0), rank))
                sends[source] = sends.get(source, 0) + 1
                found.append(Move(layer, source, to))
    return found
