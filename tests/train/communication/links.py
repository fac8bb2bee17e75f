"""Slow links and slow layers, for tests of overlap: both wait rather than work, so that a busy
machine does not count."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from train.communication.transport import Transport
from train.job import Job
from train.layout import FlatModel
from train.world import World

WIDTH = 64
LAYERS = 10


class Throttled(Transport):
    """A link of so many bytes per second, one thing after another."""

    def __init__(self, world: World, bytes_per_s: float):
        super().__init__(world)
        self.bytes_per_s, self._free_at_s = bytes_per_s, 0.0

    def count(self, sent: int) -> None:
        super().count(sent)
        takes_s = sent / self.bytes_per_s
        self._free_at_s = max(self._free_at_s, time.monotonic()) + takes_s
        time.sleep(max(0.0, self._free_at_s - time.monotonic()))


class Wait(torch.autograd.Function):
    """The identity, which takes a while in both directions; a tensor of a gradient of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        context.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(context.backward_s)
        return gradient, None, None


class Slow(nn.Module):
    """Layers of equal size whose forward and backward passes take so long together."""

    def __init__(self, forward_s: float, backward_s: float):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.forward_s, self.backward_s = forward_s / LAYERS, backward_s / LAYERS

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            # What takes its time in the backward pass comes before the layer's own gradient.
            x = Wait.apply(torch.tanh(layer(x)), self.forward_s, self.backward_s)
        return x


def flat(model: nn.Module) -> FlatModel:
    return FlatModel(model, torch.float32)


def overlapping(overlap: bool, **tables: Any) -> Job:
    """A job of which only the exchange is used: a bucket for each layer."""
    communication = {"overlap": overlap, "bucket_bytes": 4 * WIDTH * WIDTH}
    return Job.model_validate({"communication": communication, **tables})
