"""What turns a summed gradient into new masters: AdamW, Adafactor in less memory, or momentum SGD.

Both work on flat buffers in place and draw nothing at random, so that workers with equal state and
gradient stay equal to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.job import OptimizerTable
from train.layout import FlatModel, Slot

RMS_FLOOR = 1e-3
"""Adafactor: the least root mean square that a parameter's step is scaled by."""
DECAY_POWER = -0.8
"""Adafactor: 1 - beta2 of step t is t to this power."""


class Optimizer(Protocol):
    """An update rule with its state."""

    def update(self, step: int, learning_rate: float) -> None:
        """One step, the step-th (from 1): masters of the model from its gradient."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Its state, live, by "<kind>/<parameter>"."""
        ...


@dataclass(frozen=True)
class Decay:
    """AdamW's constants."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def adamw_update(
    masters: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    *,
    step: int,
    learning_rate: float,
    decay: Decay,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) in place on flat tensors of one length and
    dtype, by torch's fused kernel. moments: exp_avg and exp_avg_sq. step counts from 1."""
    if not masters.numel():
        return
    adamw(
        [masters],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [torch.tensor(float(step - 1))],  # the kernel counts before it uses it
        fused=True,
        amsgrad=False,
        beta1=decay.beta1,
        beta2=decay.beta2,
        lr=learning_rate,
        weight_decay=decay.weight_decay,
        eps=decay.epsilon,
        maximize=False,
    )


class AdamW:
    """Two moments per weight, in the masters' dtype."""

    def __init__(self, flat: FlatModel, table: OptimizerTable) -> None:
        self.flat, self.table = flat, table
        self.exp_avg = torch.zeros_like(flat.masters)
        self.exp_avg_sq = torch.zeros_like(flat.masters)

    def update(self, step: int, learning_rate: float) -> None:
        """See `Optimizer`."""
        flat, table = self.flat, self.table
        parts = ((slice(0, flat.decayed), table.weight_decay), (slice(flat.decayed, None), 0.0))
        for part, weight_decay in parts:
            adamw_update(
                flat.masters[part],
                flat.gradient[part],
                (self.exp_avg[part], self.exp_avg_sq[part]),
                step=step,
                learning_rate=learning_rate,
                decay=Decay(table.beta1, table.beta2, table.epsilon, weight_decay),
            )

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}/{name}": tensor
            for kind, flat in kinds.items()
            for name, tensor in self.flat.named(flat).items()
        }


class Adafactor:
    """Adafactor without momentum (Shazeer and Stern 2018, algorithms 4 and 5): a matrix of n x m
    keeps n + m second moments. Steps are relative to a parameter's root mean square."""

    def __init__(self, flat: FlatModel, table: OptimizerTable) -> None:
        self.flat, self.table = flat, table
        self.state: dict[str, Tensor] = {}
        for slot in flat.slots:
            for kind, shape in _factored(slot).items():
                self.state[f"{kind}/{slot.name}"] = torch.zeros(shape, dtype=flat.masters.dtype)

    def update(self, step: int, learning_rate: float) -> None:
        """See `Optimizer`."""
        for slot in self.flat.slots:
            weights = self.flat.view(self.flat.masters, slot)
            gradient = self.flat.view(self.flat.gradient, slot)
            self._update(slot.name, weights, gradient, step, learning_rate)

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        return dict(self.state)

    def _update(
        self, name: str, weights: Tensor, gradient: Tensor, step: int, learning_rate: float
    ) -> None:
        tiny = torch.finfo(weights.dtype).eps
        size = max(RMS_FLOOR, float(weights.norm()) / math.sqrt(weights.numel()))
        if weights.dim() > 1:
            weights.mul_(1 - learning_rate * self.table.weight_decay)
        variance = self._variance(name, gradient, step**DECAY_POWER)
        change = variance.clamp_(min=tiny * tiny).rsqrt_().mul_(gradient)
        too_large = max(1.0, float(change.norm()) / math.sqrt(change.numel()))
        rate = min(learning_rate, 1 / math.sqrt(step))
        weights.add_(change, alpha=-size * rate / too_large)

    def _variance(self, name: str, gradient: Tensor, new: float) -> Tensor:
        """Running second moments after this gradient, whose weight is `new`."""
        if gradient.dim() < 2:
            kept = self.state[f"exp_avg_sq/{name}"]
            return kept.lerp_(gradient.square(), new).clone()
        squares = gradient.square()
        row = self.state[f"exp_avg_sq_row/{name}"].lerp_(squares.mean(-1, keepdim=True), new)
        column = self.state[f"exp_avg_sq_column/{name}"].lerp_(squares.mean(-2, keepdim=True), new)
        tiny = torch.finfo(gradient.dtype).eps
        return (row @ column).div_(row.mean(-2, keepdim=True).clamp_(min=tiny))


def _factored(slot: Slot) -> Mapping[str, tuple[int, ...]]:
    if len(slot.shape) < 2:
        return {"exp_avg_sq": slot.shape}
    rows, columns = slot.shape
    return {"exp_avg_sq_row": (rows, 1), "exp_avg_sq_column": (1, columns)}


class Sgd:
    """SGD with momentum beta1 (0: none, and no state), as torch.optim.SGD; weight decay is that of
    AdamW, times the learning rate and of matrices alone."""

    def __init__(self, flat: FlatModel, table: OptimizerTable, momentum: float) -> None:
        self.flat, self.table, self.momentum = flat, table, momentum
        self.exp_avg = torch.zeros_like(flat.masters) if momentum else None

    def update(self, step: int, learning_rate: float) -> None:
        """See `Optimizer`."""
        change = self.flat.gradient
        if self.exp_avg is not None:
            change = self.exp_avg.mul_(self.momentum).add_(change)
        self.flat.masters[: self.flat.decayed].mul_(1 - learning_rate * self.table.weight_decay)
        self.flat.masters.add_(change, alpha=-learning_rate)

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        if self.exp_avg is None:
            return {}
        return {f"exp_avg/{name}": t for name, t in self.flat.named(self.exp_avg).items()}


def build_optimizer(flat: FlatModel, table: OptimizerTable) -> Optimizer:
    """The optimizer that the job names, with fresh state."""
    if table.name == "sgd":
        return Sgd(flat, table, table.beta1)
    return AdamW(flat, table) if table.name == "adamw" else Adafactor(flat, table)


def clip(gradient: Tensor, limit: float) -> float:
    """Scales the gradient down to `limit` (0: no limit) and returns its norm before."""
    norm = float(torch.linalg.vector_norm(gradient))
    if limit and norm > limit:
        gradient.mul_(limit / (norm + 1e-6))
    return norm
