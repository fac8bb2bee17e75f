"""One worker's share of one training step in a 1F1B pipeline (PipeDream-flush; Narayanan et al., SC
21): a stage keeps as many micro-batches in flight as stages follow it, itself included, then
alternates one forward and one backward.

The order comes from a rule on two counters, not from a list, and everything that leaves a stage can
be kept until the step ends. So a step that lost a stage goes on from any counters: whoever took the
stage over starts it again from its own, and neighbours send again what it lacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from train.parallel.pipeline_channels import Channels, Inbox
from train.parallel.pipeline_layout import Micro
from train.parallel.pipeline_part import Part


class Act(NamedTuple):
    """What a stage is about to do."""

    kind: Literal["forward", "backward", "redundant"]
    micro: int


class Batches(Protocol):
    """Where samples come from: any worker can ask for any of them."""

    def __call__(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples first..first+count-1 of the stream."""
        ...


@dataclass(frozen=True)
class Work:
    """What a stage has to do in a step. micros: in samples of the stream; scale: what losses are
    multiplied by (1 / tokens of the whole step); depth: stages from here to the chain's end, this
    one included; before, after: the neighbours' ranks."""

    micros: Sequence[Micro]
    batches: Batches
    scale: float
    depth: int
    before: int | None
    after: int | None


def is_forward_next(forwards: int, backwards: int, micros: int, depth: int) -> bool:
    """1F1B's rule: forward, while there is one to do and fewer than `depth` are in flight."""
    return forwards < micros and forwards - backwards < depth


class StageRun:
    """A stage in one step: its parts over all micro-batches, in the rule's order.

    shadow: the next stage's layers (or, in the last stage, the first's), run forward redundantly
    while this stage waits for its neighbours (Bamboo, NSDI 23). observe: told each act before it.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        work: Work,
        shadow: Part | None = None,
        observe: Callable[[Act], None] = lambda act: None,
    ) -> None:
        self.parts, self.shadow = list(parts), shadow
        self.work, self._observe = work, observe
        self.sent_on = self.sent_back = 0  # micro-batches that the neighbours have

    @property
    def forwards(self) -> int:
        """Micro-batches whose forward pass is done in every part."""
        return min(part.forwards for part in self.parts)

    @property
    def backwards(self) -> int:
        return min(part.backwards for part in self.parts)

    @property
    def losses(self) -> list[float]:
        """The micro-batches' losses; empty unless the stage ends the model."""
        return self.parts[-1].losses if self.parts[-1].is_last else []

    def run(self, channels: Channels) -> None:
        """Everything that is left of the step but the exchange of gradients."""
        first, last, work = self.parts[0], self.parts[-1], self.work
        entering = self._inbox(channels, work.before, first.forwards)
        returning = self._inbox(channels, work.after, last.backwards)
        self._send(channels)
        total = len(work.micros)
        while self.backwards < total:
            if is_forward_next(self.forwards, self.backwards, total, work.depth):
                self._forward(self.forwards, entering)
            else:
                self._backward(self.backwards, returning)
            self._send(channels)

    def _inbox(self, channels: Channels, source: int | None, have: int) -> Inbox | None:
        if source is None or have == len(self.work.micros):
            return None
        model = self.parts[0].model
        shapes = [model.boundary(micro.samples) for micro in self.work.micros[have:]]
        return channels.expect(source, shapes, model.dtype)

    def _forward(self, micro: int, entering: Inbox | None) -> None:
        self._observe(Act("forward", micro))
        value: Tensor | None = None
        for part in self.parts:
            if part.forwards == micro:  # else it was done before a loss
                if value is None:
                    value = self._input(part, micro, entering)
                part.forward(value, self._targets(part, micro), self.work.scale)
            value = part.outputs.get(micro)

    def _input(self, part: Part, micro: int, entering: Inbox | None) -> Tensor:
        if part.is_first:
            return self._samples(micro)[0]
        assert entering is not None
        return entering.get(self._redundant)

    def _targets(self, part: Part, micro: int) -> Tensor | None:
        return self._samples(micro)[1] if part.is_last else None

    def _samples(self, micro: int) -> tuple[Tensor, Tensor]:
        return self.work.batches(*self.work.micros[micro])

    def _backward(self, micro: int, returning: Inbox | None) -> None:
        self._observe(Act("backward", micro))
        gradient: Tensor | None = None
        for part in reversed(self.parts):
            if part.backwards == micro:  # else it was done before a loss
                if gradient is None and not part.is_last:
                    assert returning is not None
                    gradient = returning.get(self._redundant)
                part.backward(gradient)
            gradient = part.gradients.get(micro)

    def _send(self, channels: Channels) -> None:
        """Hands on what the neighbours lack."""
        first, last, work = self.parts[0], self.parts[-1], self.work
        while work.after is not None and self.sent_on < last.forwards:
            channels.send(last.sent(last.outputs, self.sent_on), work.after)
            self.sent_on += 1
        while work.before is not None and self.sent_back < first.backwards:
            channels.send(first.sent(first.gradients, self.sent_back), work.before)
            self.sent_back += 1

    def _redundant(self) -> bool:
        """One forward pass of the shadow, in time that would be spent waiting."""
        shadow = self.shadow
        if shadow is None or shadow.forwards == len(self.work.micros):
            return False
        micro = shadow.forwards
        if not shadow.is_first and micro >= self.parts[-1].forwards:
            return False
        self._observe(Act("redundant", micro))
        value = self._samples(micro)[0] if shadow.is_first else self.parts[-1].outputs[micro]
        shadow.forward(value, self._targets(shadow, micro), self.work.scale)
        return True
