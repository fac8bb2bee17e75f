"""How the layers of a model keep what their backward passes need, as a job's `[memory]` says."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.memory.gact import Gact
from train.memory.mesa import Mesa
from train.memory.recompute import recomputed
from train.memory.saved import Codec, SavedAs
from train.model import Layer, Llama
from train.tables import MemoryTable


class CodedLayers:
    """Has the first `layers` layers of a model save through a codec. Chance is keyed by the seed
    and the tokens of a pass, so a run that goes on draws what it would have drawn."""

    def __init__(self, model: Llama, codec: Mesa | Gact, seed: int, layers: int) -> None:
        self.model, self.codec, self.seed = model, codec, seed
        self._now: Codec = codec
        for number, layer in enumerate(_first(model, layers)):
            layer.forward = partial(self._forward, str(number), layer, layer.forward)  # type: ignore[method-assign]
        model.register_forward_pre_hook(self._begin)

    def _begin(self, _model: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled() or self._now is not self.codec:
            return
        tokens = arguments[0]
        key = hashlib.sha256(f"{self.seed}/".encode() + tokens.contiguous().numpy().tobytes())
        seed = int.from_bytes(key.digest()[:8], "little") >> 1
        self.codec.generator.manual_seed(seed)
        if isinstance(self.codec, Gact) and self.codec.due():
            self.codec.adapt(partial(self.gradient, tokens[:1]), seed)

    def gradient(self, tokens: Tensor, codec: Codec) -> Sequence[Tensor]:
        """Of the loss of tokens (batch, tokens), with all saved in the codec's form; what the
        parameters' own gradients are stays as it is."""
        self._now = codec
        try:
            logits = self.model(tokens[:, :-1])
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = functional.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten())
            return torch.autograd.grad(loss, list(self.model.parameters()))
        finally:
            self._now = self.codec

    def _forward(self, name: str, layer: Layer, forward: Any, x: Tensor, *rest: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x, *rest)  # type: ignore[no-any-return]
        heads = layer.self_attn.heads
        with SavedAs(self._now, name, heads, x, [*layer.parameters(), *rest]):
            return forward(x, *rest)  # type: ignore[no-any-return]


def install(model: Llama, table: MemoryTable, seed: int) -> CodedLayers | None:
    """Does to the model's layers what the table says; None where that has no state."""
    if table.activations in ("mesa", "gact"):
        codec = Mesa() if table.activations == "mesa" else Gact(table.bits)
        return CodedLayers(model, codec, seed, table.layers)
    if table.activations == "recompute":
        for layer in _first(model, table.layers):
            layer.forward = recomputed(layer.forward, table.recompute)  # type: ignore[method-assign]
    return None


def _first(model: Llama, layers: int) -> list[Layer]:
    every = list(model.model.layers)
    chosen = every[: layers or None]
    assert all(isinstance(layer, Layer) for layer in chosen)
    return chosen  # type: ignore[return-value]
