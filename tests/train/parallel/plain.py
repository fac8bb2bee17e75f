"""The oracle: the same model trained by one process with nothing but torch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.train.parallel import tiny


class Run(NamedTuple):
    """Mean losses by step; gradients by step and layer, flat; weights by name after the last."""

    losses: list[float]
    gradients: list[list[Tensor]]
    weights: dict[str, Tensor]


def train(steps: int, samples: int, layers: int = 8, *, lr: float = 0.01) -> Run:
    modules = nn.ModuleList(tiny.build(n, layers, torch.float64) for n in range(layers))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr)
    losses, gradients = [], []
    for step in range(steps):
        inputs, targets = tiny.batches(step * samples, samples)
        value = inputs
        for module in modules:
            value = module(value)
        loss = nn.functional.cross_entropy(value.flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        gradients.append([_flat(module) for module in modules])
        optimizer.step()
    weights = {f"layers.{n}": p.detach() for n, p in modules.named_parameters()}
    return Run(losses, gradients, weights)


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
