"""A small language model in layers, in float64, on text that the project makes itself: embedding,
residual blocks with attention over the past, a head."""

import torch
from torch import Tensor, nn

from train.parallel.pipeline_layers import LayeredModel

VOCABULARY, WIDTH, TOKENS = 17, 12, 8


class Block(nn.Module):
    """Attention over the past and a gated layer, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # a key's bias has no gradient
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(~mask, float("-inf"))
        x = x + scores.softmax(-1) @ v
        more: Tensor = self.down(nn.functional.silu(self.up(x)))
        return x + more


def build(layer: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """Layer by index with weights that depend on nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + layer)
        if layer == 0:
            module: nn.Module = nn.Embedding(VOCABULARY, WIDTH)
        elif layer == layers - 1:
            module = nn.Linear(WIDTH, VOCABULARY)
        else:
            module = Block()
    return module.to(dtype)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def model(layers: int = 8, dtype: torch.dtype = torch.float64) -> LayeredModel:
    return LayeredModel(
        count=layers,
        build=lambda layer: build(layer, layers, dtype),
        prefix=lambda layer: f"layers.{layer}.",
        boundary=lambda samples: (samples, TOKENS, WIDTH),
        loss=loss,
        dtype=dtype,
    )


def batches(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples with a pattern to learn; sample n is the same whoever asks."""
    rows = []
    for n in range(first, first + count):
        generator = torch.Generator().manual_seed(n)
        start, pace = torch.randint(1, VOCABULARY, (2,), generator=generator).tolist()
        rows.append([(start + pace * t) % VOCABULARY for t in range(TOKENS + 1)])
    tokens = torch.tensor(rows)
    return tokens[:, :-1], tokens[:, 1:]
