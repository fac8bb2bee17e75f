"""A stage of a virtual worker: a pipeline that never runs empty (HetPipe, Park et al., ATC 2020).

`in_flight` minibatches are under way in a chain at once, and as many make a wave. Minibatch p is
computed, forward and backward and on every stage, with the weights of its start: the newest version
that was pulled, and the chain's own updates up to minibatch p - in_flight. So inside a chain a
minibatch misses at most in_flight - 1 updates (the local staleness); what it misses of other chains
the server's bound says. Weights of each minibatch under way are kept (PipeDream's stashing). A
job's chains (`hetpipe_pipeline`) wait for their own waves instead, and so need no second copy.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from train.heterogeneous.hetpipe_server import FACTS
from train.heterogeneous.hetpipe_wire import Servers
from train.parallel.pipeline_channels import Channels, Inbox
from train.parallel.pipeline_layers import LayeredModel
from train.parallel.pipeline_layout import Span
from train.world import World

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Inputs and targets of a chain's minibatch, by its number."""


@dataclass(frozen=True)
class ChainPlan:
    """in_flight: minibatches at once, and of a wave; rate: the learning rate by finished waves, of
    plain SGD, by which a chain's own updates reach its weights before they come back from a server;
    scale: what a minibatch's summed loss is multiplied by."""

    in_flight: int
    rate: Callable[[int], float]
    scale: float

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ValueError(f"in_flight = {self.in_flight}: 1 or more is accepted")


class Neighbours(NamedTuple):
    """Ranks of the stages before and after, None at the ends; position: from 0."""

    before: int | None
    after: int | None
    position: int


class _Under(NamedTuple):
    """A minibatch under way."""

    leaves: list[Tensor]
    given: Tensor
    out: Tensor


class ChainStage:
    """One rank. losses: of the minibatches, on the last stage; versions: of the weights that each
    minibatch was computed with, as pulled."""

    def __init__(
        self,
        model: LayeredModel,
        span: Span,
        servers: Servers,
        plan: ChainPlan,
        batches: Batches,
        neighbours: Neighbours,
    ) -> None:
        self.model, self.servers, self.plan, self._batches = model, servers, plan, batches
        self.neighbours = neighbours
        self._layers: list[nn.Module] = [model.build(n) for n in range(*span)]
        self._named = [dict(layer.named_parameters()) for layer in self._layers]
        parameters = [p for named in self._named for p in named.values()]
        self._shapes = [p.shape for p in parameters]
        self.start = sum(_numel(model.build(n)) for n in range(span.start))
        self.weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.losses: list[float] = []
        self.versions: list[int] = []
        self._version = 0
        self._under: dict[int, _Under] = {}
        self._gradients: dict[int, Tensor] = {}
        self._waves: dict[int, Tensor] = {}

    def run(self, world: World, waves: int) -> None:
        """So many waves from the start; then the weights are those of all chains' waves. Every
        stage of every chain calls it. WorldChanged when somebody is gone."""
        each, count = self.plan.in_flight, waves * self.plan.in_flight
        warm = max(1, each - self.neighbours.position)
        channels, finished = Channels(world), False
        ahead, back = self._inboxes(channels, count)
        try:
            begun = 0
            for number in range(count):
                while begun < min(count, number + warm):
                    self._forward(begun, channels, ahead)
                    begun += 1
                self._backward(number, channels, back)
            channels.flush()
            self.servers.pull(waves, self.start, self.weights, exact=True)
            finished = True
        finally:
            channels.close(broken=not finished)

    def _inboxes(self, channels: Channels, count: int) -> tuple[Inbox | None, Inbox | None]:
        inputs, _ = self._batches(0)
        shape, dtype = self.model.boundary(len(inputs)), self.model.dtype

        def inbox(rank: int | None) -> Inbox | None:
            if rank is None:
                return None
            return channels.expect(rank, itertools.repeat(shape, count), dtype)

        return inbox(self.neighbours.before), inbox(self.neighbours.after)

    def _forward(self, number: int, channels: Channels, inbox: Inbox | None) -> None:
        self._take_up(number - self.plan.in_flight)
        self.versions.append(self._version)
        sizes = [shape.numel() for shape in self._shapes]
        leaves = [
            part.view(shape).requires_grad_()
            for part, shape in zip(
                torch.split(self.weights.clone(), sizes), self._shapes, strict=True
            )
        ]
        inputs, targets = self._batches(number)
        given = inputs if inbox is None else inbox.get().requires_grad_()
        value, left = given, iter(leaves)
        for layer, named in zip(self._layers, self._named, strict=True):
            value = functional_call(layer, {name: next(left) for name in named}, (value,))
        if self.neighbours.after is None:
            value = self.model.loss(value, targets) * self.plan.scale
            self.losses.append(float(value.detach()))
        else:
            channels.send(value.detach().clone(), self.neighbours.after)
        self._under[number] = _Under(leaves, given, value)

    def _backward(self, number: int, channels: Channels, inbox: Inbox | None) -> None:
        under = self._under.pop(number)
        wanted = list(under.leaves)
        if self.neighbours.before is not None:
            wanted.append(under.given)
        grads = torch.autograd.grad(under.out, wanted, None if inbox is None else inbox.get())
        if self.neighbours.before is not None:
            channels.send(grads[-1].contiguous(), self.neighbours.before)
        own = grads[: len(under.leaves)]
        flat = torch.cat([grad.reshape(-1) for grad in own])
        self._gradients[number] = flat
        wave, place = divmod(number, self.plan.in_flight)
        summed = self._waves.setdefault(wave, torch.zeros_like(flat))
        summed += flat
        if place == self.plan.in_flight - 1:
            self.servers.push(wave, self.start, summed, torch.zeros(FACTS).double())

    def _take_up(self, number: int) -> None:
        """The chain's own update of a minibatch reaches the weights; at the end of a wave they come
        from the servers, as old as the bound allows, and own waves that they lack are added."""
        if number < 0:
            return
        wave, place = divmod(number, self.plan.in_flight)
        self.weights.add_(self._gradients.pop(number), alpha=-self.plan.rate(wave))
        if place < self.plan.in_flight - 1:
            return
        found = self.servers.pull(wave + 1, self.start, self.weights)
        self._version = min(pulled.version for pulled in found)
        at = 0
        for pulled in found:
            size = pulled.weights.numel()
            for own in range(pulled.version, wave + 1):
                part = self._waves[own][at : at + size]
                self.weights[at : at + size].add_(part, alpha=-self.plan.rate(own))
            at += size
        for old in [n for n in self._waves if n < self._version]:
            del self._waves[old]


def _numel(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
