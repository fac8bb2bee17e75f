"""A model as layers one after another, and the layers that a worker holds with their gradients and
optimizer state, so that any layer can move to another worker by itself."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

STATE = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LayeredModel:
    """`count` layers, each taking what the one before it returns.

    build: a layer by its index, with its first weights, the same wherever it is built; prefix: what
    its parameters' names begin with in the whole model; boundary: the shape of what passes between
    layers, for a number of samples; loss: sum over the samples, of the last layer's output and the
    targets. All parameters and what passes between layers have `dtype`.
    """

    count: int
    build: Callable[[int], nn.Module]
    prefix: Callable[[int], str]
    boundary: Callable[[int], tuple[int, ...]]
    loss: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class AdamW:
    """The settings of torch.optim.AdamW; lr by the number of finished steps. vector_decay: of what
    has fewer than two dimensions; None: as of all else."""

    lr: Callable[[int], float] = field(default=lambda step: 1e-3)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    vector_decay: float | None = None

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """One update at a time and tensor by tensor, so that the bits of a layer's weights do not
        depend on its company."""
        held = list(parameters)
        other = self.weight_decay if self.vector_decay is None else self.vector_decay
        matrices: dict[str, Any] = {"params": [p for p in held if p.dim() > 1]}
        vectors: dict[str, Any] = {"params": [p for p in held if p.dim() < 2]}
        return torch.optim.AdamW(
            [matrices, vectors | {"weight_decay": other}],
            lr=self.lr(0),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            foreach=False,
        )


class HeldLayers:
    """Layers by index, each a module with an optimizer of its own.

    A layer's state and its gradient are also given and taken as one flat tensor; the state's is
    weights, first moments, second moments, each over all parameters in their order.
    """

    def __init__(self, model: LayeredModel, update: AdamW) -> None:
        self.model = model
        self._update = update
        self.modules: dict[int, nn.Module] = {}
        self._optimizers: dict[int, torch.optim.AdamW] = {}

    def build(self, layers: Iterable[int]) -> None:
        """Layers with their first weights."""
        for layer in layers:
            module = self.model.build(layer)
            others = {id(p) for m in self.modules.values() for p in m.parameters()}
            for name, parameter in module.named_parameters():
                if id(parameter) in others:
                    raise ValueError(
                        f"{self.model.prefix(layer)}{name} belongs to another layer too: a "
                        "pipeline needs layers that share no weights (tie_word_embeddings = false)"
                    )
                if parameter.dtype != self.model.dtype:
                    raise ValueError(f"{name} is {parameter.dtype}, the model {self.model.dtype}")
            self.modules[layer] = module
            self._optimizers[layer] = self._update.over(module.parameters())

    def drop(self, layers: Iterable[int]) -> None:
        """Forgets layers."""
        for layer in layers:
            del self.modules[layer], self._optimizers[layer]

    def numel(self, layer: int) -> int:
        """Weights of a layer that is held."""
        return sum(p.numel() for p in self.modules[layer].parameters())

    def gradient(self, layer: int) -> Tensor:
        """A copy of a layer's gradient, flat; zeros where nothing flowed."""
        parts = [
            p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1)
            for p in self.modules[layer].parameters()
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.model.dtype)

    def apply(self, layer: int, gradient: Tensor, step: int) -> None:
        """One optimizer step of a layer by a flat gradient, after `step` finished ones."""
        at = 0
        for parameter in self.modules[layer].parameters():
            end = at + parameter.numel()
            parameter.grad = gradient[at:end].reshape(parameter.shape)
            at = end
        optimizer = self._optimizers[layer]
        for group in optimizer.param_groups:
            group["lr"] = self._update.lr(step)
        if at:
            optimizer.step()
        optimizer.zero_grad()

    def clear_gradients(self) -> None:
        """Forgets what was accumulated."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """A layer's state by "<kind>/<parameter's name in the model>", live."""
        optimizer, prefix = self._optimizers[layer], self.model.prefix(layer)
        found: dict[str, Tensor] = {}
        for name, parameter in self.modules[layer].named_parameters():
            state = optimizer.state.get(parameter, {})
            found[f"param/{prefix}{name}"] = parameter.detach()
            for kind in STATE[1:]:
                moment = state.get(kind)
                found[f"{kind}/{prefix}{name}"] = (
                    torch.zeros_like(parameter.detach()) if moment is None else moment
                )
        return found

    def load(self, layer: int, tensors: dict[str, Tensor], step: int) -> None:
        """Takes over a layer's state as it was after `step` finished steps; builds the layer if it
        is not held yet."""
        if layer not in self.modules:
            self.build([layer])
        optimizer, prefix = self._optimizers[layer], self.model.prefix(layer)
        for name, parameter in self.modules[layer].named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"param/{prefix}{name}"])
            if step:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{kind: tensors[f"{kind}/{prefix}{name}"].clone() for kind in STATE[1:]},
                }

    def flat(self, layer: int) -> Tensor:
        """A copy of a layer's state as one tensor of 3 x numel."""
        tensors = self.tensors(layer)
        kinds = [[v for k, v in tensors.items() if k.startswith(f"{kind}/")] for kind in STATE]
        parts = [v.reshape(-1) for kind in kinds for v in kind]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.model.dtype)

    def load_flat(self, layer: int, flat: Tensor, step: int) -> None:
        """The reverse of `flat`."""
        if layer not in self.modules:
            self.build([layer])
        prefix, at, tensors = self.model.prefix(layer), 0, {}
        for kind in STATE:
            for name, parameter in self.modules[layer].named_parameters():
                end = at + parameter.numel()
                tensors[f"{kind}/{prefix}{name}"] = flat[at:end].reshape(parameter.shape)
                at = end
        self.load(layer, tensors, step)
