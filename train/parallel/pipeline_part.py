"""Consecutive layers that run as one: forward and backward of micro-batches, and how far they are.

Stages are made of parts. A worker that took over another's layers has two parts, each as far in the
step as whoever computed it; see `train.parallel.pipeline`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.parallel.pipeline_layers import LayeredModel
from train.parallel.pipeline_layout import Span


class _Graph(NamedTuple):
    """What a micro-batch's backward pass needs: the leaf it entered by, and the end."""

    entering: Tensor
    end: Tensor


class Part:
    """Layers of one span. forwards, backwards: micro-batches done, always 0, 1, 2, ... in order.

    outputs, gradients: what left the part, forward and backward, by micro-batch; dropped
    once sent unless `keep`, which is for sending it once more after a loss. losses: of the
    micro-batches, where the span ends the model. Gradients of weights add up in the modules.
    """

    def __init__(
        self, model: LayeredModel, modules: Sequence[nn.Module], span: Span, *, keep: bool
    ) -> None:
        self.model, self.span, self.keep = model, span, keep
        self._modules = modules
        self._graphs: dict[int, _Graph] = {}
        self.forwards = self.backwards = self.most_graphs = 0
        self.outputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.losses: list[float] = []

    @property
    def is_first(self) -> bool:
        return self.span.start == 0

    @property
    def is_last(self) -> bool:
        return self.span.stop == self.model.count

    def forward(self, entering: Tensor, targets: Tensor | None, scale: float) -> None:
        """The next micro-batch. targets: for the last span, whose loss is multiplied by `scale`."""
        if not self.is_first:
            entering = entering.detach().requires_grad_()
        value = entering
        for module in self._modules:
            value = module(value)
        if self.is_last:
            assert targets is not None
            value = self.model.loss(value, targets) * scale
            self.losses.append(float(value.detach()))
        else:
            self.outputs[self.forwards] = value.detach()
        self._graphs[self.forwards] = _Graph(entering, value)
        self.most_graphs = max(self.most_graphs, len(self._graphs))
        self.forwards += 1

    def backward(self, gradient: Tensor | None) -> None:
        """The next micro-batch. gradient: of its output; None where the span ends in the loss."""
        graph = self._graphs.pop(self.backwards)
        torch.autograd.backward([graph.end], None if gradient is None else [gradient])
        if not self.is_first:
            assert graph.entering.grad is not None
            self.gradients[self.backwards] = graph.entering.grad
        self.backwards += 1

    def sent(self, left: dict[int, Tensor], micro: int) -> Tensor:
        """What left at `micro`, dropped unless it may be asked for again."""
        return left[micro] if self.keep else left.pop(micro)
