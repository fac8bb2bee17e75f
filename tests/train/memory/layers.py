"""A small model whose layers save in some way, and what is then alive and what gradient comes out.

Bytes are counted apart from the code under test: `plain_bytes` by hooks of its own around a plain
model, `live_bytes` as the storages of all tensors that Python can reach.
"""

import gc
import warnings
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from tests.train import tiny
from train.job import Job
from train.memory.activations import CodedLayers, install
from train.model import Llama
from train.weights import build_model, read_start

TOKENS = 128
SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "feed_forward": 352}


def job(compute: str = "float32", **memory: Any) -> Job:
    """A job of SHAPE with this `[memory]`."""
    run = {"batch_tokens": 2 * TOKENS, "micro_batch_tokens": 2 * TOKENS}
    return tiny.job(
        model=SHAPE,
        data={"sequence_tokens": TOKENS},
        run=run,
        precision={"compute": compute},
        memory=memory,
    )


def build(wanted: Job) -> tuple[Llama, CodedLayers | None]:
    """The job's model in its compute dtype, its layers changed as the job says."""
    torch.set_num_threads(1)
    model = build_model(wanted, read_start(wanted))
    if wanted.precision.compute == "bfloat16":
        model.bfloat16()
    return model, install(model, wanted.memory, seed=0)


def config(wanted: Job) -> ModelConfig:
    """Of the job's model."""
    return read_start(wanted).config


def tokens(seed: int = 0) -> Tensor:
    """(2, TOKENS + 1) of made-up text."""
    text = (tiny.text(40, seed) * 4).encode()[: 2 * (TOKENS + 1)]
    return torch.tensor(list(text)).view(2, TOKENS + 1)


def gradient(model: Llama, batch: Tensor) -> tuple[float, Tensor]:
    """Loss, and the gradient of all parameters as one vector in float64."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.loss(batch)
    loss.backward()
    parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(parts)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm."""
    return float((found - expected).norm() / expected.norm())


def stack(model: Llama, x: Tensor) -> Tensor:
    """All layers, one after the other."""
    cos, sin = model.angles(x.shape[1], x.dtype)
    for layer in model.model.layers:
        x = layer(x, cos, sin)
    return x


def entry(model: Llama) -> Tensor:
    """What the first layer gets, (2, TOKENS, hidden)."""
    x: Tensor = model.model.embed_tokens(tokens()[:, :-1])
    return x.detach().requires_grad_()


def plain_bytes(model: Llama) -> int:
    """What a plain model's layers save, distinct storages, weights left out; the first input and
    the angles counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stack(model, entry(model))
    del out
    return sum(kept.values())


def saved_bytes(model: Llama) -> int:
    """What is alive after the layers' forward pass and was not before it, their result left out."""
    x = entry(model)
    before = live_bytes()
    out = stack(model, x)
    after = live_bytes()
    return after - before - out.nbytes


def live_bytes() -> int:
    """Of the storages of all tensors that Python holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that warn when they are looked at
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
