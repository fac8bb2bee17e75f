"""A decoder made of launchers alone: Llama's layers on 4-bit weights and an int8 cache in pages.

The same code runs over kernels.triton and over kernels.reference, and their logits agree.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests.kernels.ops.cases import Source, four
from tests.kernels.ops.measure import agree
from tests.kernels.triton.conformance import DEVICE

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, VOCABULARY = 2, 64, 4, 2, 32, 96, 50
PAGES, PAGE_TOKENS, EPS = 9, 2, 1e-5
# By module, the same in both packages.
OPS = {
    "norm": ("rms_norm", "rms_norm_residual"),
    "linear_w4": ("w4_linear", "dequantize_w4"),
    "rope": ("rope",),
    "kv_cache": ("kv_write",),
    "attention_paged": ("paged_attention",),
    "gated": ("gated",),
    "sampling": ("sample",),
}
Weight = tuple[torch.Tensor, ...]


class Layer(NamedTuple):
    """Weights as w4_linear takes them, norms, and the pages of keys and values with scales."""

    qkv: Weight
    out: Weight
    up: Weight
    down: Weight
    norms: tuple[torch.Tensor, torch.Tensor]
    cache: tuple[torch.Tensor, ...]


class Model(NamedTuple):
    """head serves as the embedding too."""

    layers: list[Layer]
    norm: torch.Tensor
    head: Weight


def implementation(package: str) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for module, names in OPS.items():
        loaded = importlib.import_module(f"{package}.{module}")
        found |= {name: getattr(loaded, name) for name in names}
    return found


def linear(source: Source, rows: int, columns: int) -> Weight:
    weight, scales, mins = four(source, rows, columns, 32, symmetric=False)
    return weight.to(DEVICE), (scales * 0.3).to(DEVICE), (mins * 0.3).to(DEVICE)


def model() -> Model:
    """Random, with pages that hold nothing yet: 127 in every number and NaN in every scale."""
    source = Source(7, torch.float32)

    def norm() -> torch.Tensor:
        return (source.plain(HIDDEN) + 0.5).to(DEVICE)

    layers = []
    for _ in range(LAYERS):
        shape = (PAGES, PAGE_TOKENS, KV_HEADS)
        numbers = torch.full((*shape, WIDTH), 127, dtype=torch.int8, device=DEVICE)
        scales = torch.full(shape, torch.nan, device=DEVICE)
        layers.append(
            Layer(
                linear(source, (HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN),
                linear(source, HIDDEN, HEADS * WIDTH),
                linear(source, 2 * INNER, HIDDEN),
                linear(source, HIDDEN, INNER),
                (norm(), norm()),
                (numbers, numbers.clone(), scales, scales.clone()),
            )
        )
    return Model(layers, norm(), linear(source, VOCABULARY, HIDDEN))


def step(
    ops: dict[str, Callable[..., Any]],
    model: Model,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    """Logits [S, V] after one more token of each sequence, at position context - 1."""
    place = (context - 1).long()
    pages = tables.gather(1, place[:, None] // PAGE_TOKENS)[:, 0].long()
    slots = pages * PAGE_TOKENS + place % PAGE_TOKENS
    frequencies = 100.0 ** -(torch.arange(WIDTH // 2, device=DEVICE) / (WIDTH // 2))
    angles = place[:, None] * frequencies
    added = ops["dequantize_w4"](*model.head, torch.float32)[tokens]
    x = torch.zeros_like(added)
    for layer in model.layers:
        keys, values, *scales = layer.cache
        normed, x = ops["rms_norm_residual"](added, x, layer.norms[0], EPS)
        fused = ops["w4_linear"](normed, *layer.qkv).view(len(tokens), -1, WIDTH)
        q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = ops["rope"](q, k, angles.cos(), angles.sin())
        ops["kv_write"](k, v, slots, keys, values, *scales)
        attended = ops["paged_attention"](q, keys, values, *scales, tables, context, 0, 2)
        attended = ops["w4_linear"](attended.flatten(1), *layer.out)
        normed, x = ops["rms_norm_residual"](attended, x, layer.norms[1], EPS)
        inner = ops["gated"](ops["w4_linear"](normed, *layer.up), "silu")
        added = ops["w4_linear"](inner, *layer.down)
    logits: torch.Tensor = ops["w4_linear"](
        ops["rms_norm"](x + added, model.norm, EPS), *model.head
    )
    return logits


def decode(package: str, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and tokens of each step, of three sequences that each choose another way."""
    ops, made = implementation(package), model()
    order = torch.tensor([[7, 2, 0], [4, 8, 5], [1, 3, 6]], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([3, 41, 17], device=DEVICE)
    settings = ([0.0, 0.8, 1.5], [0, 5, 0], [1.0, 1.0, 0.9], [0.0, 0.3, 0.7])
    choice = [torch.tensor(each, device=DEVICE) for each in settings]
    logits, chosen = [], []
    for position in range(steps):
        context = torch.full((3,), position + 1, dtype=torch.int32, device=DEVICE)
        logits.append(step(ops, made, tokens, order, context))
        tokens = ops["sample"](logits[-1], *choice)
        chosen.append(tokens)
    return logits, chosen


def test_launchers_alone_are_a_decoder():
    """Three tokens, over the edge of a page; nothing of the NaN in the pages is ever seen."""
    wanted, right = decode("kernels.reference", 3)
    got, chosen = decode("kernels.triton", 3)
    for mine, logits in zip(got, wanted, strict=True):
        agree(mine, logits)
    assert torch.equal(torch.stack(chosen), torch.stack(right))
    assert len(torch.stack(right).unique()) > 5, "the sequences should go different ways"
